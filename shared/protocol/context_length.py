"""The context length that an engine tells in its list of models. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator

AUTO: Final = "auto"
"""Stands for the longest context that fits on the devices."""
MAX_TOKENS: Final = 1 << 40


def _context_length(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS
    if value is None or value == AUTO or whole:
        return value
    raise ValueError(f'must be a number of tokens, at least 1, or "{AUTO}"')


ContextLength = Annotated[int | Literal["auto"] | None, BeforeValidator(_context_length)]
"""Tokens of prompt and answer together, or AUTO; None: as the engine decides."""


def length_in(model_id: str, page: Any, field: str = "max_model_len") -> int:
    """The context length of the model in an engine's `/v1/models`, or of the first entry that has one. `field` is where
    an entry has it, with dots between the keys of nested objects.

    Raises:
        ValueError: there is none.
    """
    data = page.get("data") if isinstance(page, dict) else None
    entries = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    for entry in sorted(entries, key=lambda entry: entry.get("id") != model_id):
        length: Any = entry
        for key in field.split("."):
            length = length.get(key) if isinstance(length, dict) else None
        if isinstance(length, int) and not isinstance(length, bool) and 0 < length < 1 << 53:
            return length
    raise ValueError(f"no {field}")
