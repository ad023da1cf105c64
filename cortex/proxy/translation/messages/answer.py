"""A chat completion, or an engine's error, as an answer of Anthropic's Messages API. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from cortex.proxy.translation.chat_answer import (
    ChatCalls,
    abort_message,
    choice_of,
    content_text,
    finish_reason_of,
    reasoning_of,
    said_in,
)
from cortex.proxy.translation.chat_stream import error_message
from cortex.proxy.translation.interface import Json, WholeAnswer, engine_object, to_json
from shared.errors import anthropic_error_type

_STOP_REASONS: Final = {"length": "max_tokens", "content_filter": "refusal"}
_NOT_IN_IDS: Final = re.compile(r"[^A-Za-z0-9_-]")
_OTHER_PREFIX: Final = re.compile(r"^(chatcmpl-tool-|chatcmpl-|call_|msg_|toolu_)")

MAX_QUOTED: Final = 2000
"""Characters to quote of an engine's error that is not JSON."""


class ClientSettings(NamedTuple):
    """What of a client's request its answer depends on. `thinks`: the client may get what the model thought."""

    model: str
    stops: Sequence[str]
    thinks: bool

    @classmethod
    def of(cls, given: Json) -> ClientSettings:
        thinking = given.get("thinking")
        thinks = not (isinstance(thinking, dict) and thinking.get("type") == "disabled")
        return cls(str(given.get("model")), given.get("stop_sequences") or (), thinks)


def message_answer(body: bytes, settings: ClientSettings) -> WholeAnswer:
    """The message for a complete chat completion."""
    found = engine_object(body)
    choice = None if found is None else choice_of(found)
    said = None if choice is None else said_in(choice)
    if found is None or choice is None or said is None:
        if found is not None and found.get("error"):
            return error_answer(502, body)
        return _error(502, "the engine answered 200 without a chat completion")
    reason = finish_reason_of(choice)
    aborted = abort_message(reason)
    if aborted is not None:
        return _error(502, aborted)
    message_id = anthropic_id("msg", found.get("id"))
    content: list[Json] = []
    thought = reasoning_of(said)
    if thought and settings.thinks:
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    text = text_in(said)
    if text:
        content.append({"type": "text", "text": text})
    for index, call in enumerate(ChatCalls().take(choice)):
        given = call.input()
        if given is not None:
            tool_id = anthropic_id("toolu", call.call_id, f"{message_id}_{index}")
            content.append({"type": "tool_use", "id": tool_id, "name": call.name, "input": given})
        elif reason == "length":  # cut off at the token limit: its arguments are not JSON
            content.append({"type": "text", "text": f"{call.name}({call.arguments}"})
        else:
            return _error(502, "the model called a tool with arguments that are not a JSON object")
    called = any(block["type"] == "tool_use" for block in content)
    if not content:
        content.append({"type": "text", "text": ""})
    message = new_message(message_id, str(found.get("model") or settings.model))
    message.update(content=content, usage=usage_of(found.get("usage")), **ending_of(choice, settings, called=called))
    return WholeAnswer(200, to_json(message))


def error_answer(status: int, body: bytes) -> WholeAnswer:
    """An engine's error, with its status."""
    if status < 400:
        return _error(502, f"the engine answered {status}")
    found = engine_object(body)
    if found is None:
        said = body.decode("utf-8", "replace").strip()[:MAX_QUOTED]
        return _error(status, f"the engine answered {status}: {said}" if said else f"the engine answered {status}")
    return _error(status, error_message(found))


def _error(status: int, message: str) -> WholeAnswer:
    return WholeAnswer(status, to_json(error_body(status, message)))


def error_body(status: int, message: str) -> Json:
    return {"type": "error", "error": {"type": anthropic_error_type(status), "message": message}}


def new_message(message_id: str, model: str) -> Json:
    """A message without content yet."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def usage_of(given: Any) -> Json:
    """Token counts. Anthropic's `input_tokens` do not include those from the cache, unlike `prompt_tokens`."""
    given = given if isinstance(given, dict) else {}
    details = given.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    usage: Json = {
        "input_tokens": max(_count(given.get("prompt_tokens")) - cached, 0),
        "output_tokens": _count(given.get("completion_tokens")),
    }
    if cached:
        usage["cache_read_input_tokens"] = cached
    return usage


def ending_of(choice: Json, settings: ClientSettings, *, called: bool) -> Json:
    """`stop_reason` and `stop_sequence`. `called`: the message calls tools. vLLM names the sequence in `stop_reason`,
    SGLang in `matched_stop`."""
    finish = finish_reason_of(choice)
    for matched in (choice.get("stop_reason"), choice.get("matched_stop")):
        if finish == "stop" and isinstance(matched, str) and matched in settings.stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    reason = _STOP_REASONS.get(finish or "") or ("tool_use" if called else "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def text_in(said: Json) -> str:
    """The model's words, a refusal included: Anthropic's API has no block for it."""
    return content_text(said.get("content")) + content_text(said.get("refusal"))


def anthropic_id(prefix: str, given: Any, otherwise: str | None = None) -> str:
    """An engine's id with Anthropic's prefix; of `otherwise`, or a new one, if the engine gave none."""
    known = given if isinstance(given, str) and given else otherwise or uuid.uuid4().hex
    return f"{prefix}_{_NOT_IN_IDS.sub('_', _OTHER_PREFIX.sub('', known))}"


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
