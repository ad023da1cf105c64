"""litellm as a library, with its `openai/` and `anthropic/` providers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import litellm

from tests.clients.scripts.report import BASE_URL, QUESTION, TOOL, WEATHER_QUESTION, report


def ask(model: str, question: str, **more: Any) -> Any:
    return litellm.completion(
        model=f"openai/{model}",
        api_base=f"{BASE_URL}/v1",
        api_key="unused",
        messages=[{"role": "user", "content": question}],
        **more,
    )


def stream(model: str) -> Iterator[str]:
    for chunk in ask(model, QUESTION, stream=True):
        if chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def plain(model: str) -> str:
    text: str = ask(model, QUESTION).choices[0].message.content
    return text


def messages_stream(model: str) -> Iterator[str]:
    chunks = litellm.completion(
        model=f"anthropic/{model}",
        api_base=BASE_URL,
        api_key="unused",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=512,
        stream=True,
    )
    return (chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content)


def tool_stream(model: str) -> tuple[str, Any]:
    chunks = list(ask(model, WEATHER_QUESTION, tools=[TOOL], stream=True))
    return called(litellm.stream_chunk_builder(chunks))


def tool_plain(model: str) -> tuple[str, Any]:
    return called(ask(model, WEATHER_QUESTION, tools=[TOOL]))


def called(answer: Any) -> tuple[str, Any]:
    (call,) = answer.choices[0].message.tool_calls
    return call.function.name, json.loads(call.function.arguments)


if __name__ == "__main__":
    report(stream=stream, plain=plain, tool_stream=tool_stream, tool_plain=tool_plain, messages_stream=messages_stream)
