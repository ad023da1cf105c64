"""pydantic-ai: agents with OpenAIChatModel and OpenAIResponsesModel; they run a tool and send the result back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.scripts.report import BASE_URL, QUESTION, WEATHER_QUESTION, report

provider = OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="unused")
calls: list[str] = []
loop = asyncio.new_event_loop()  # its connections belong to one loop


def get_weather(city: str) -> str:
    """The weather in a city."""
    calls.append(city)
    return f"sunny in {city}"


def agent(model: str, *tools: Any) -> Any:
    return Agent(OpenAIChatModel(model, provider=provider), tools=tools)


def stream(model: str) -> Iterator[str]:
    return iter(loop.run_until_complete(streamed(agent(model), QUESTION)))


async def streamed(agent: Any, question: str) -> list[str]:
    async with agent.run_stream(question) as result:
        return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]


def plain(model: str) -> str:
    text: str = agent(model).run_sync(QUESTION).output
    return text


def responses_stream(model: str) -> Iterator[str]:
    return iter(loop.run_until_complete(streamed(Agent(OpenAIResponsesModel(model, provider=provider)), QUESTION)))


def responses_tool(model: str) -> tuple[str, Any]:
    return called(
        Agent(OpenAIResponsesModel(model, provider=provider), tools=[get_weather]).run_sync(WEATHER_QUESTION).output
    )


def tool_stream(model: str) -> tuple[str, Any]:
    return called("".join(loop.run_until_complete(streamed(agent(model, get_weather), WEATHER_QUESTION))))


def tool_plain(model: str) -> tuple[str, Any]:
    return called(agent(model, get_weather).run_sync(WEATHER_QUESTION).output)


def called(answer: str) -> tuple[str, Any]:
    assert "sunny in Paris" in answer, answer
    return "get_weather", {"city": calls.pop()}


if __name__ == "__main__":
    report(
        stream=stream,
        plain=plain,
        tool_stream=tool_stream,
        tool_plain=tool_plain,
        responses_stream=responses_stream,
        responses_tool=responses_tool,
    )
