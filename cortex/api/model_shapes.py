"""The entries of `/v1/models` as Anthropic's clients and Codex read them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Final

from shared.errors import InvalidRequest
from shared.protocol import ModelFacts
from shared.protocol.base import WireModel

Entry = Mapping[str, Any]
"""An entry in OpenAI's shape (`cortex.api.models.model_entry`)."""

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 1000

_CODEX_INSTRUCTIONS: Final = (
    "You are a coding agent in a terminal on the user's computer. Work on the user's task until it is done: read the "
    "relevant files, run commands and edit code with the tools you have. Follow the conventions of the code base, "
    "change only what the task requires, and check your work. Never undo changes that are not yours. Finish with a "
    "short summary of what you did."
)


def told_facts(views: Iterable[ModelFacts]) -> dict[str, Any]:
    """What the neurons tell of a model, with only the fields that one of them tells. Where copies differ: the tightest
    limits, everything that one of them can do, the first price."""
    facts: dict[str, Any] = {}
    for view in views:
        for name in ModelFacts.model_fields:
            told = getattr(view, name)
            if isinstance(told, WireModel):
                told = told.model_dump(exclude_none=True)
            if told is not None and told != {}:
                facts[name] = _combined(name, facts[name], told) if name in facts else told
    return facts


def _combined(name: str, before: Any, told: Any) -> Any:
    if isinstance(before, bool):
        return before or told
    if isinstance(before, list):
        return list(dict.fromkeys([*before, *told]))
    if name == "limit":
        return {key: min(each[key] for each in (before, told) if key in each) for key in {**before, **told}}
    if name == "modalities":
        return {key: _combined(key, before[key], told[key]) for key in before}
    return before


def anthropic_model(entry: Entry) -> dict[str, Any]:
    """One entry in Anthropic's shape. `max_input_tokens` and `max_tokens` are null if unknown."""
    limit = entry["limit"] or {}
    return {
        "type": "model",
        "id": entry["id"],
        "display_name": entry["id"],
        "created_at": datetime.fromtimestamp(entry["created"], timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": entry["max_model_len"],
        "max_tokens": limit.get("output"),
    }


def anthropic_page(ids: Sequence[str], query: Mapping[str, str], entry: Callable[[str], Entry]) -> dict[str, Any]:
    """A page of Anthropic's list: `limit` entries (1 to 1000, by default 20) after `after_id` or before `before_id`.

    `ids` are those of the whole list, in order; `entry` gives one of them.

    Raises:
        InvalidRequest: a parameter is wrong, or names an unknown model.
    """
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise InvalidRequest("after_id and before_id cannot be combined", param="before_id")
    if before is not None:
        end = _place(ids, before, "before_id")
        start = max(0, end - limit)
        more = start > 0
    else:
        start = 0 if after is None else _place(ids, after, "after_id") + 1
        end = min(len(ids), start + limit)
        more = end < len(ids)
    page = ids[start:end]
    return {
        "data": [anthropic_model(entry(model_id)) for model_id in page],
        "has_more": more,
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def codex_model(entry: Entry) -> dict[str, Any]:
    """One entry as Codex decodes it (codex-rs/protocol/src/openai_models.rs, `ModelInfo`). It drops the whole list if
    a required field is missing."""
    return {
        "slug": entry["id"],
        "display_name": entry["id"],
        "description": None,
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "availability_nux": None,
        "upgrade": None,
        "base_instructions": _CODEX_INSTRUCTIONS,
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,
        "truncation_policy": {"mode": "bytes", "limit": 10000},
        "supports_parallel_tool_calls": False,
        "context_window": entry["max_model_len"],
        "experimental_supported_tools": [],
    }


def _limit(given: str | None) -> int:
    if given is None:
        return DEFAULT_LIMIT
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= MAX_LIMIT:
        raise InvalidRequest(f"limit must be an integer from 1 to {MAX_LIMIT}, got {given[:64]!r}", param="limit")
    return int(given)


def _place(ids: Sequence[str], model_id: str, param: str) -> int:
    try:
        return ids.index(model_id)
    except ValueError:
        raise InvalidRequest(f"{param}: no model {model_id[:256]!r} in the list", param=param) from None
