"""langchain-openai: ChatOpenAI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from langchain_openai import ChatOpenAI, StreamChunkTimeoutError

from tests.clients.scripts.report import BASE_URL, QUESTION, TOOL, WEATHER_QUESTION, report

loop = asyncio.new_event_loop()  # the connections that ChatOpenAI shares belong to one loop


def chat(model: str, **settings: Any) -> Any:
    return ChatOpenAI(model=model, base_url=f"{BASE_URL}/v1", api_key="unused", max_retries=0, **settings)


def stream(model: str) -> Iterator[str]:
    return (chunk.text for chunk in chat(model).stream(QUESTION) if chunk.text)


def plain(model: str) -> str:
    text: str = chat(model).invoke(QUESTION).text
    return text


async def streamed(chat: Any) -> list[str]:
    return [chunk.text async for chunk in chat.astream(QUESTION) if chunk.text]


def async_stream(model: str) -> list[str]:
    return loop.run_until_complete(streamed(chat(model)))


def impatient(model: str) -> str:
    """The timeout between chunks, shorter than the wait for the first one."""
    try:
        loop.run_until_complete(streamed(chat(model, stream_chunk_timeout=0.1)))
    except StreamChunkTimeoutError:
        return "timed out"
    return "answered"


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
    report(
        stream=stream,
        plain=plain,
        tool_stream=tool_stream,
        tool_plain=tool_plain,
        async_stream=async_stream,
        impatient=impatient,
    )
