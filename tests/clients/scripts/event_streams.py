"""Events of a stream turned into text: for the two libraries that parse server-sent events and nothing more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from tests.clients.scripts.report import QUESTION, TOOL, WEATHER_QUESTION, report

Events: TypeAlias = Iterator[tuple[str, str]]
"""(event, data) of each event that the library finds."""


def report_events(events: Callable[[str, dict[str, Any]], Events]) -> None:
    """`events` posts a body to a path and parses the answer."""

    def chunks(body: dict[str, Any]) -> Iterator[Any]:
        for name, data in events("/v1/chat/completions", body):
            assert name == "message", name
            if data == "[DONE]":
                return
            yield json.loads(data)
        raise AssertionError("no [DONE]")

    def stream(model: str) -> Iterator[str]:
        for chunk in chunks({**_asked(model, QUESTION), "stream": True}):
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    yield choice["delta"]["content"]

    def tool_stream(model: str) -> tuple[str, Any]:
        name = arguments = ""
        for chunk in chunks({**_asked(model, WEATHER_QUESTION), "stream": True, "tools": [TOOL]}):
            for call in [call for choice in chunk["choices"] for call in choice["delta"].get("tool_calls") or []]:
                name += call["function"].get("name") or ""
                arguments += call["function"].get("arguments") or ""
        return name, json.loads(arguments)

    def messages_stream(model: str) -> Iterator[str]:
        for name, data in events("/v1/messages", {**_asked(model, QUESTION), "stream": True, "max_tokens": 512}):
            event = json.loads(data)
            assert event["type"] == name, (name, event)
            if name == "content_block_delta":
                yield event["delta"]["text"]

    report(stream=stream, tool_stream=tool_stream, messages_stream=messages_stream)


def _asked(model: str, question: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}]}
