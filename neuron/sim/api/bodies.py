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
from neuron.sim.engine.engine import SimEngine
from neuron.sim.engine.replies import Prompt

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


def served_model(name: object, engine: SimEngine) -> str:
    """The requested model or adapter; without a name, the first model. Raises ApiError 404 when it is not served
    here."""
    settings = engine.settings
    if name is None or name == "":
        return settings.name
    if not isinstance(name, str) or (name not in settings.served_names and name not in engine.adapters):
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
    """Raises ApiError 400 when a prompt fills the context, or `limit` is above it. A prompt and `limit` that exceed it
    together are fine: the answer ends with the context."""
    context = settings.max_model_len
    if limit is not None and limit > context:
        raise bad_request(
            f"{param}={limit} cannot be greater than max_model_len={context}. Please request fewer output tokens. "
            f"(parameter={param}, value={limit})",
            param,
        )
    for count in (prompt.token_count for prompt in prompts):
        if count >= context:
            raise bad_request(
                f"This model's maximum context length is {context} tokens. However, your prompt contains at least "
                f"{context + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                f"the length of the input prompt. (parameter=input_tokens, value={context + 1})",
                "input_tokens",
            )


def content_text(content: object) -> str:
    """The text of a message's content: a string, or the textual parts of a list."""
    return "\n".join(_texts(content))


def _texts(content: object) -> list[str]:
    if isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        return []
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            text = part.get("text")
            texts += [text] if isinstance(text, str) else _texts(part.get("content"))
    return [text for text in texts if text]


def conversation(messages: object, *, param: str = "messages") -> Prompt:
    """The prompt of a list of messages in any dialect; the answer quotes the user's last one, or the result of a tool.

    Raises:
        ApiError: 400, it is not a list of objects, or is empty.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise malformed(f"[{{'type': 'list_type', 'loc': ('body', '{param}')}}]", param)
    if not messages:
        raise bad_request(f"{param} must not be empty.", param)
    turns = [(_role(message), _turn_texts(message)) for message in messages]
    text = "".join(f"{role}: {' '.join(texts)}\n" for role, texts in turns)
    last = max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    results = [texts for role, texts in turns[last + 1 :] if role == "tool"]
    said = [texts for role, texts in turns if role == "user"]
    quoted = "\n".join(results[-1]) if results else _own_words(said[-1]) if said else ""
    return Prompt(text, quoted, after_tool=bool(results))


def _role(message: Mapping[str, Any]) -> str:
    """`tool` for the result of a call, `assistant` for a call, in OpenAI's two dialects and in Anthropic's."""
    kind = str(message.get("type", ""))
    if kind.endswith("_call_output"):
        return "tool"
    if kind.endswith("_call") or kind == "reasoning":
        return "assistant"
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if any(isinstance(part, dict) and part.get("type") == "tool_result" for part in parts):
        return "tool"
    return str(message.get("role", "user"))


def _turn_texts(message: Mapping[str, Any]) -> list[str]:
    """All that a message adds to the prompt; for a tool's result only that, without what the client adds to it."""
    content = message.get("content")
    if _role(message) == "tool" and isinstance(content, list):
        content = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"] or content
    texts = _texts(content) + _texts(message.get("output"))
    for key in ("tool_calls", "arguments", "input"):
        value = message.get(key)
        if value:
            texts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return texts


def _own_words(texts: Sequence[str]) -> str:
    """The user's words without the blocks in tags that coding agents put beside them."""
    return "\n".join([text for text in texts if not text.startswith("<")] or texts)


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
