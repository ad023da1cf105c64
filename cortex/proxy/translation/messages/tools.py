"""Tools and the choice among them. Pure."""

from __future__ import annotations

from typing import Any

from cortex.proxy.translation.fields import invalid, text_of
from cortex.proxy.translation.interface import Json


def chat_tools(given: Json, engine: str) -> Json:
    """`tools`, `tool_choice` and `parallel_tool_calls` of the chat, those that are needed.

    Raises:
        InvalidRequest: malformed, or a tool that Anthropic's servers or models define themselves.
    """
    tools = given.get("tools")
    if not tools:
        return {}
    if not isinstance(tools, list):
        raise invalid("tools", "must be a list")
    chat: Json = {"tools": [_function(tool, f"tools[{index}]", engine) for index, tool in enumerate(tools)]}
    choice = given.get("tool_choice")
    if choice is not None:
        if not isinstance(choice, dict):
            raise invalid("tool_choice", "must be an object with a type")
        chat["tool_choice"] = _choice(choice)
        if choice.get("disable_parallel_tool_use") is True:
            chat["parallel_tool_calls"] = False
    return chat


def _function(tool: Any, param: str, engine: str) -> Json:
    if not isinstance(tool, dict):
        raise invalid(param, "must be an object")
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


def _choice(choice: Json) -> Any:
    kind = choice.get("type")
    if kind in ("auto", "none"):
        return kind
    if kind == "any":
        return "required"
    if kind == "tool":
        return {"type": "function", "function": {"name": text_of(choice, "name", "tool_choice")}}
    raise invalid("tool_choice.type", f"must be auto, any, tool or none, got {kind!r}")
