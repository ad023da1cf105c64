"""Parses request bodies: JSON, the model's name, typed fields, and text in the forms that clients send."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from neuron.sim.api.errors import bad_request, malformed, unknown_model
from neuron.sim.engine import tokens
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.engine import Prompt

Body = Mapping[str, Any]

_MAX_ANSWERS = 16384  # VLLM_MAX_N_SEQUENCES


async def read_json(request: web.Request) -> Body:
    """The body as a JSON object. Raises ApiError 400 when it is not one."""
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise malformed(f"[{{'type': 'json_invalid', 'msg': 'JSON decode error', 'ctx': {str(error)!r}}}]") from error
    if not isinstance(body, dict):
        raise malformed("[{'type': 'model_attributes_type', 'msg': 'Input should be a valid dictionary'}]")
    return body


def served_model(name: object, settings: EngineSettings) -> str:
    """The requested model; without a name, the first one. Raises ApiError 404 when it is not served here."""
    if name is None or name == "":
        return settings.name
    if not isinstance(name, str) or name not in settings.served_names:
        raise unknown_model(name, settings.served_names)
    return name


def integer(body: Body, key: str, *, least: int = 0) -> int | None:
    """A whole number; None when it is absent or null. Raises ApiError 400 for anything else."""
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise malformed(f"[{{'type': 'int_type', 'loc': ('body', '{key}'), 'input': {value!r}}}]", key)
    if value < least:
        raise bad_request(f"{key} must be at least {least}, got {value}.", key)
    return int(value)


def answers_wanted(body: Body) -> int:
    """`n`, 1 by default. Raises ApiError 400 when it is not from 1 to vLLM's limit."""
    wanted = integer(body, "n", least=1) or 1
    if wanted > _MAX_ANSWERS:
        raise bad_request(f"n must be at most {_MAX_ANSWERS}, got {wanted}.", "n")
    return wanted


def required(body: Body, key: str) -> Any:
    """A required field. Raises ApiError 400 when it is missing."""
    if body.get(key) is None:
        raise malformed(f"[{{'type': 'missing', 'loc': ('body', '{key}'), 'msg': 'Field required'}}]", key)
    return body[key]


def wants_stream(body: Body) -> bool:
    return body.get("stream") is True


def wants_usage(body: Body) -> bool:
    """`stream_options.include_usage`."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def check_length(limit: int | None, prompts: Sequence[Prompt], settings: EngineSettings, param: str) -> None:
    """Raises ApiError 400 when a prompt, or a prompt and its answer, do not fit the context."""
    room = settings.max_model_len
    for count in (prompt.token_count for prompt in prompts):
        if count >= room:
            raise bad_request(
                f"This model's maximum context length is {room} tokens. However, your request has {count} input "
                "tokens. Please reduce the length of the input messages.",
                "input_tokens",
            )
        if limit is not None and limit + count > room:
            raise bad_request(
                f"'{param}' is too large: {limit}. This model's maximum context length is {room} tokens and your "
                f"request has {count} input tokens ({limit} > {room} - {count}).",
                param,
            )


def content_text(content: object) -> str:
    """The text of a message's content: a string, or the textual parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            text = part.get("text")
            texts.append(text if isinstance(text, str) else content_text(part.get("content")))
    return "\n".join(text for text in texts if text)


def conversation(messages: object, *, param: str = "messages") -> Prompt:
    """The prompt of a list of messages; the answer quotes the user's last one.

    Raises:
        ApiError: 400, it is not a list of objects, or is empty.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise malformed(f"[{{'type': 'list_type', 'loc': ('body', '{param}')}}]", param)
    if not messages:
        raise bad_request(f"{param} must not be empty.", param)
    texts = [(str(message.get("role", "user")), content_text(message.get("content"))) for message in messages]
    spoken = [text for role, text in texts if role == "user"]
    return Prompt(text="".join(f"{role}: {text}\n" for role, text in texts), quoted=spoken[-1] if spoken else "")


def text_list(value: object, param: str) -> list[str]:
    """One or several texts: a string, a list of strings, a list of token ids, or a list of such lists.

    Raises:
        ApiError: 400, it is anything else, or empty.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [tokens.text_of(value)]
        texts = [tokens.text_of(item) if _are_ids(item) else item for item in value]
        if all(isinstance(text, str) for text in texts):
            return texts
    raise malformed(f"[{{'type': 'string_type', 'loc': ('body', '{param}')}}]", param)


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )
