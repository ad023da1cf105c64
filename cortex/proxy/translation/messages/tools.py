"""Tools and the choice among them. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cortex.proxy.translation.fields import invalid, object_of, objects_of, text_of
from cortex.proxy.translation.interface import Json


def chat_tools(given: Json, engine: str) -> Json:
    """`tools`, `tool_choice` and `parallel_tool_calls` of the chat, those that are needed.

    Raises:
        InvalidRequest: malformed, or a tool that Anthropic's servers or models define themselves.
    """
    tools = [
        _function(tool, f"tools[{index}]", engine) for index, tool in enumerate(objects_of(given.get("tools"), "tools"))
    ]
    choice = object_of(given.get("tool_choice"), "tool_choice")
    wanted = _choice(choice, {tool["function"]["name"] for tool in tools}) if choice else None
    if not tools:
        return {}
    chat: Json = {"tools": tools}
    if wanted is not None:
        chat["tool_choice"] = wanted
    if choice.get("disable_parallel_tool_use") is True:
        chat["parallel_tool_calls"] = False
    return chat


def _function(tool: Json, param: str, engine: str) -> Json:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise invalid(
            param,
            f"{engine} does not have the tool {kind!r}, which Anthropic defines: remove it, or offer a tool of your own"
            " with an input_schema",
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise invalid(f"{param}.input_schema", "must be a JSON schema")
    function: Json = {"name": text_of(tool, "name", param), "parameters": {"type": "object", **schema}}
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    if isinstance(tool.get("strict"), bool):
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _choice(choice: Json, offered: Collection[str]) -> Any:
    kind = choice.get("type")
    if kind in ("auto", "none"):
        return kind
    if kind == "any":
        if not offered:
            raise invalid("tool_choice", "any needs at least one tool in `tools`")
        return "required"
    if kind == "tool":
        name = text_of(choice, "name", "tool_choice")
        if name not in offered:
            raise invalid("tool_choice.name", f"no tool {name!r} in `tools`")
        return {"type": "function", "function": {"name": name}}
    raise invalid("tool_choice.type", f"must be auto, any, tool or none, got {kind!r}")
