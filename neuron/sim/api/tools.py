"""Tools and structured output in a request, in OpenAI's two dialects and in Anthropic's."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuron.sim.api.bodies import Body
from neuron.sim.api.errors import bad_request, malformed
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.replies import Prompt, Reply, Tool, call_of, chosen_tool, json_reply


def with_tools(prompt: Prompt, body: Body) -> Prompt:
    """The prompt as a chat template renders it: the tools come first."""
    tools = body.get("tools")
    if not isinstance(tools, list) or not tools:
        return prompt
    return replace(prompt, text=f"tools: {json.dumps(tools, ensure_ascii=False)}\n{prompt.text}")


def reply_to(body: Body, prompt: Prompt, settings: EngineSettings) -> Reply | None:
    """A tool call or a JSON document, when the request asks for one or a model would give it; None: text.

    Raises:
        ApiError: 400, vLLM's complaint about `tools` or `tool_choice`.
    """
    return _tool_call(body, prompt, settings) or structured_reply(body, prompt)


def structured_reply(body: Body, prompt: Prompt) -> Reply | None:
    """A JSON document, when the request asks for one. Raises ApiError 400 when it does not say which."""
    schema = _wanted_schema(body)
    return None if schema is None else json_reply(schema, prompt)


def call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def _tool_call(body: Body, prompt: Prompt, settings: EngineSettings) -> Reply | None:
    tools = _offered(body.get("tools"))
    choice, name = _choice(body.get("tool_choice"))
    if choice == "none":
        return None
    if not tools:
        if choice in ("required", "named"):
            raise bad_request("When using `tool_choice`, `tools` must be set. (parameter=tool_choice)", "tool_choice")
        return None
    if choice == "named":
        tool = next((tool for tool in tools if tool.name == name), None)
        if tool is None:
            message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise bad_request(f"{message} (parameter=tool_choice)", "tool_choice")
        return call_of(tool, prompt, named=True)
    if not settings.auto_tools and choice == "auto":
        raise bad_request('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
    tool = chosen_tool(tools, prompt) or (tools[0] if choice == "required" else None)
    return None if tool is None else call_of(tool, prompt)


def _offered(value: object) -> list[Tool]:
    """The functions among `tools`; a client does not expect calls of hosted tools."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise malformed("[{'type': 'list_type', 'loc': ('body', 'tools')}]", "tools")
    tools: list[Tool] = []
    for tool in value:
        function = tool.get("function")
        given = function if isinstance(function, dict) else tool
        name = given.get("name")
        schema = given.get("parameters", given.get("input_schema"))
        if isinstance(name, str) and (tool.get("type") == "function" or isinstance(schema, dict)):
            tools.append(Tool(name, schema if isinstance(schema, Mapping) else {}))
    return tools


def _choice(value: object) -> tuple[str, str | None]:
    """`tool_choice` as ("auto" | "none" | "required" | "named", the name)."""
    if isinstance(value, dict):
        kind = value.get("type")
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else value.get("name")
        if kind in ("function", "tool") and isinstance(name, str):
            return "named", name
        value = value.get("mode", kind)
    if value in (None, "auto", "allowed_tools"):
        return "auto", None
    if value in ("required", "any"):
        return "required", None
    if value == "none":
        return "none", None
    message = f'Invalid value for `tool_choice`: {value}! Only named tools, "none", "auto" or "required" are supported.'
    raise bad_request(f"{message} (parameter=tool_choice)", "tool_choice")


def _wanted_schema(body: Body) -> Mapping[str, Any] | None:
    """The schema in `response_format`, `text.format`, `output_config.format` or `structured_outputs.json`."""
    text, config = body.get("text"), body.get("output_config")
    for given in (
        body.get("response_format"),
        text.get("format") if isinstance(text, dict) else None,
        config.get("format") if isinstance(config, dict) else None,
    ):
        if not isinstance(given, dict):
            continue
        if given.get("type") == "json_object":
            return {"type": "object", "properties": {"answer": {"type": "string"}}}
        if given.get("type") == "json_schema":
            inner = given.get("json_schema", given)
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise bad_request("response_format: json_schema needs a schema", "response_format")
            return schema
    structured = body.get("structured_outputs")
    schema = structured.get("json") if isinstance(structured, dict) else None
    return schema if isinstance(schema, dict) else None
