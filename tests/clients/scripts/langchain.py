"""langchain-openai: ChatOpenAI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_openai import ChatOpenAI

from tests.clients.scripts.report import BASE_URL, QUESTION, TOOL, WEATHER_QUESTION, report


def chat(model: str) -> Any:
    return ChatOpenAI(model=model, base_url=f"{BASE_URL}/v1", api_key="unused", max_retries=0)


def stream(model: str) -> Iterator[str]:
    return (chunk.text for chunk in chat(model).stream(QUESTION) if chunk.text)


def plain(model: str) -> str:
    text: str = chat(model).invoke(QUESTION).text
    return text


def tool_stream(model: str) -> tuple[str, Any]:
    message = None
    for chunk in chat(model).bind_tools([TOOL]).stream(WEATHER_QUESTION):
        message = chunk if message is None else message + chunk
    return called(message)


def tool_plain(model: str) -> tuple[str, Any]:
    return called(chat(model).bind_tools([TOOL]).invoke(WEATHER_QUESTION))


def called(message: Any) -> tuple[str, Any]:
    (call,) = message.tool_calls
    return call["name"], call["args"]


if __name__ == "__main__":
    report(stream=stream, plain=plain, tool_stream=tool_stream, tool_plain=tool_plain)
