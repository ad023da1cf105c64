"""A request of Anthropic's Messages API as the body of a chat completion. Pure."""

from __future__ import annotations

from typing import Final

from cortex.proxy.translation.fields import effort_of, invalid, object_of, wants_stream
from cortex.proxy.translation.interface import Json
from cortex.proxy.translation.messages.chat_messages import chat_messages
from cortex.proxy.translation.messages.tools import chat_tools

_SAME: Final = ("temperature", "top_p", "top_k")
"""Fields with the same meaning in both; `top_k` is an extension that all engines for local models have."""

_ENGINE_OPTIONS: Final = (
    "frequency_penalty",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
)
"""Options of chat completions that clients may add. Anthropic's other fields (`service_tier`, `context_management`,
`container`, …) concern Anthropic's servers only and are left out."""

_THINKING: Final = ("enabled", "adaptive", "disabled")


def chat_request(given: Json, engine: str) -> Json:
    """The chat completion for `given`; `engine` names the engine in errors.

    Raises:
        InvalidRequest: malformed, or chat completions cannot express it.
    """
    limit = given.get("max_tokens")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise invalid("max_tokens", "must be a positive integer")
    chat: Json = {
        **prompt_part(given, engine),
        "max_tokens": limit,
        **{name: given[name] for name in (*_SAME, *_ENGINE_OPTIONS) if given.get(name) is not None},
    }
    stops = given.get("stop_sequences")
    if stops:
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise invalid("stop_sequences", "must be a list of strings")
        chat["stop"] = stops
    user = object_of(given.get("metadata"), "metadata").get("user_id")
    if isinstance(user, str):
        chat["user"] = user
    if wants_stream(given):
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True}
    _add_output(chat, given)
    return chat


def prompt_part(given: Json, engine: str) -> Json:
    """What of the request decides about the prompt: model, messages, tools, and whether the model thinks."""
    if given.get("mcp_servers"):
        raise invalid("mcp_servers", f"{engine} cannot call MCP servers: connect them to the client instead")
    chat: Json = {"model": given.get("model"), "messages": chat_messages(given, engine), **chat_tools(given, engine)}
    last = chat["messages"][-1]
    if last["role"] == "assistant" and "tool_calls" not in last:
        # The answer continues this text. Engines with a template take these options, the others continue anyway.
        chat["continue_final_message"] = True
        chat["add_generation_prompt"] = False
    options = _template_options(given)
    if options:
        chat["chat_template_kwargs"] = options
    return chat


def _template_options(given: Json) -> Json:
    """Arguments of the chat template: the client's own, and `enable_thinking`, which templates with such a switch have
    and the others ignore."""
    options = object_of(given.get("chat_template_kwargs"), "chat_template_kwargs")
    kind = object_of(given.get("thinking"), "thinking").get("type")
    return {"enable_thinking": kind != "disabled", **options} if kind in _THINKING else options


def _add_output(chat: Json, given: Json) -> None:
    """`output_config` (effort and format), and the older `output_format`."""
    config = object_of(given.get("output_config"), "output_config")
    chat |= effort_of(config, "output_config")
    wanted = config.get("format") or given.get("output_format")
    if not wanted:
        return
    if (
        not isinstance(wanted, dict)
        or wanted.get("type") != "json_schema"
        or not isinstance(wanted.get("schema"), dict)
    ):
        raise invalid("output_config.format", "must be of type json_schema, with a schema")
    schema = {"name": "answer", "schema": wanted["schema"], "strict": True}
    chat["response_format"] = {"type": "json_schema", "json_schema": schema}
