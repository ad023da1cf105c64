"""The openai library: chat, responses, models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai

from tests.clients.scripts.report import BASE_URL, QUESTION, TOOL, WEATHER, WEATHER_QUESTION, report

client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="unused", max_retries=0)
chat: Any = client.chat.completions  # typed differently in the old and the current version


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def stream(model: str) -> Iterator[str]:
    for chunk in chat.create(model=model, messages=asked(QUESTION), stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def plain(model: str) -> str:
    answer: str = chat.create(model=model, messages=asked(QUESTION)).choices[0].message.content
    return answer


def tool_stream(model: str) -> tuple[str, Any]:
    name = arguments = ""
    for chunk in chat.create(model=model, messages=asked(WEATHER_QUESTION), tools=[TOOL], stream=True):
        for call in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    return name, json.loads(arguments)


def tool_plain(model: str) -> tuple[str, Any]:
    answer = chat.create(model=model, messages=asked(WEATHER_QUESTION), tools=[TOOL])
    function = answer.choices[0].message.tool_calls[0].function
    return function.name, json.loads(function.arguments)


def responses_stream(model: str) -> Iterator[str]:
    for event in client.responses.create(model=model, input=QUESTION, stream=True):
        if event.type == "response.output_text.delta":
            yield event.delta


def responses_plain(model: str) -> str:
    return client.responses.create(model=model, input=QUESTION).output_text


def responses_tool(model: str) -> tuple[str, Any]:
    tool: Any = {"type": "function", **WEATHER, "strict": False}
    name = arguments = ""
    for event in client.responses.create(model=model, input=WEATHER_QUESTION, tools=[tool], stream=True):
        if event.type == "response.output_item.added" and event.item.type == "function_call":
            name = event.item.name
        elif event.type == "response.function_call_arguments.delta":
            arguments += event.delta
    return name, json.loads(arguments)


def models(model: str) -> list[str]:
    return [entry.id for entry in client.models.list() if entry.id == model]


if __name__ == "__main__":
    report(
        stream=stream,
        plain=plain,
        tool_stream=tool_stream,
        tool_plain=tool_plain,
        responses_stream=responses_stream,
        responses_plain=responses_plain,
        responses_tool=responses_tool,
        models=models,
    )
