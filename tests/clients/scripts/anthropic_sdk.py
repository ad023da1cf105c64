"""The anthropic library: messages, token counts, models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic

from tests.clients.scripts.report import BASE_URL, QUESTION, WEATHER, WEATHER_QUESTION, report

client = anthropic.Anthropic(base_url=BASE_URL, api_key="unused", max_retries=0)
api: Any = client.messages  # typed differently in the old and the current version
TOOL = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}


def request(model: str, question: str) -> dict[str, Any]:
    return {"model": model, "max_tokens": 512, "messages": [{"role": "user", "content": question}]}


def stream(model: str) -> Iterator[str]:
    with api.stream(**request(model, QUESTION)) as events:
        yield from events.text_stream


def plain(model: str) -> str:
    answer: str = api.create(**request(model, QUESTION)).content[0].text
    return answer


def tool_stream(model: str) -> tuple[str, Any]:
    with api.stream(**request(model, WEATHER_QUESTION), tools=[TOOL]) as events:
        return called(events.get_final_message())


def tool_plain(model: str) -> tuple[str, Any]:
    return called(api.create(**request(model, WEATHER_QUESTION), tools=[TOOL]))


def counted(model: str) -> str:
    messages = request(model, QUESTION)["messages"]
    return str(api.count_tokens(model=model, messages=messages, system="Be brief.", tools=[TOOL]).input_tokens)


def called(message: Any) -> tuple[str, Any]:
    assert message.stop_reason == "tool_use"
    (block,) = [block for block in message.content if block.type == "tool_use"]
    return block.name, block.input


def models(model: str) -> list[str]:
    return [entry.id for entry in client.models.list(limit=100) if entry.id == model]


if __name__ == "__main__":
    counting = {"counted": counted} if hasattr(api, "count_tokens") else {}
    report(stream=stream, plain=plain, tool_stream=tool_stream, tool_plain=tool_plain, models=models, **counting)
