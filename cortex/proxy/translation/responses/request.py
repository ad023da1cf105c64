"""A request of the Responses API as a request for a chat. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from cortex.proxy.translation.fields import effort_of, invalid, is_set, object_of, wants_stream
from cortex.proxy.translation.interface import Json, read_object
from cortex.proxy.translation.responses.input_items import messages_of
from cortex.proxy.translation.responses.tools import ToolSet

_NEEDS_MEMORY: Final = "the engine stores no responses; send the whole conversation in `input`"
_REFUSED: Final = {
    "previous_response_id": _NEEDS_MEMORY,
    "conversation": _NEEDS_MEMORY,
    "background": "the engine answers in the request only; leave `background` out",
    "prompt": "the engine stores no prompt templates; send the text in `instructions` and `input`",
    "context_management": "the engine does not shorten conversations; leave it out",
    "moderation": "the engine does not moderate; leave it out",
}
"""Fields that change the answer in a way that a chat cannot."""

_SAME: Final = (
    "model",
    "temperature",
    "top_p",
    "user",
    # Not of OpenAI's Responses API, but engines that have it accept them there too.
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "chat_template_kwargs",
    "priority",
)
"""Fields that a chat has under the same name."""

_ECHOED: Final = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": None,
    "tool_choice": "auto",
    "top_p": None,
    "user": None,
}
"""Settings that the answer repeats, and what it says without them."""


@dataclass(frozen=True)
class ChatRequest:
    """What is sent to the engine, and what its answer has to be translated with. `settings`: what the response says
    about the request, by field."""

    body: Json
    tools: ToolSet
    settings: Json


def chat_request(body: bytes) -> ChatRequest:
    """Translates a body of `POST /v1/responses`.

    Raises:
        InvalidRequest: malformed, or it asks for what a chat cannot do. `param` names the field.
    """
    given = read_object(body)
    for key, reason in _REFUSED.items():
        if is_set(given, key):
            raise invalid(key, reason)
    tools = ToolSet()
    tools.add(given.get("tools"), "tools")
    chat: Json = {key: given[key] for key in _SAME if given.get(key) is not None}
    chat["messages"] = messages_of(given.get("instructions"), given.get("input"), tools)
    tools.check()
    choice = tools.choice(given.get("tool_choice"))
    if tools.functions:
        chat["tools"] = list(tools.functions.values())
        if choice is not None:
            chat["tool_choice"] = choice
        if given.get("parallel_tool_calls") is not None:
            chat["parallel_tool_calls"] = given["parallel_tool_calls"]
    chat |= _limits(given) | _format(given) | _logprobs(given)
    if wants_stream(given):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return ChatRequest(chat, tools, _settings(given, tools))


def _limits(given: Json) -> Json:
    limit = given.get("max_output_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise invalid("max_output_tokens", "must be a positive integer")
    effort = effort_of(object_of(given.get("reasoning"), "reasoning"), "reasoning")
    return effort if limit is None else {"max_tokens": limit, **effort}


def _format(given: Json) -> Json:
    """`text.format` as `response_format`."""
    wanted = object_of(object_of(given.get("text"), "text").get("format"), "text.format")
    kind = wanted.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind != "json_schema":
        raise invalid("text.format.type", f"must be text, json_object or json_schema, got {json.dumps(kind)}")
    schema = {key: wanted[key] for key in ("name", "description", "schema", "strict") if wanted.get(key) is not None}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _logprobs(given: Json) -> Json:
    included = given.get("include")
    asked = isinstance(included, list) and "message.output_text.logprobs" in included
    top = given.get("top_logprobs")
    if not asked and not top:
        return {}
    return {"logprobs": True} | ({} if top is None else {"top_logprobs": top})


def _settings(given: Json, tools: ToolSet) -> Json:
    """What the engine did not do is not claimed: nothing was stored, and nothing cut off to fit the context."""
    settings: Json = {key: default if given.get(key) is None else given[key] for key, default in _ECHOED.items()}
    text = object_of(given.get("text"), "text")
    return settings | {
        "background": False,
        "metadata": object_of(given.get("metadata"), "metadata"),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None} | object_of(given.get("reasoning"), "reasoning"),
        "store": False,
        "text": text | {"format": text.get("format") or {"type": "text"}},
        "tools": tools.kept,
        "top_logprobs": given.get("top_logprobs") or 0,
        "truncation": "disabled",
    }
