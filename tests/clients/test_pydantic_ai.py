"""pydantic-ai: an agent with a tool, and one with a result type."""

from __future__ import annotations

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import PythonClients

PROGRAM = """
import asyncio, json, sys
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
url, name, api, streamed = sys.argv[1:]
kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
model = kind(name, provider=OpenAIProvider(base_url=url, api_key="none"))
agent = Agent(model)

@agent.tool_plain
def get_weather(city: str) -> str:
    return f"sunny in {city}"

class City(BaseModel):
    name: str
    people: int

async def main():
    question = "What is the weather in Paris?"
    if streamed == "yes":
        async with agent.run_stream(question) as run:
            text = await run.get_output()
    else:
        text = (await agent.run(question)).output
    city = (await Agent(model, output_type=City).run("Tell me about Paris")).output
    print(json.dumps([text, city.name]))

asyncio.run(main())
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_agents_end(fleet: ClientFleet, python: PythonClients, api: str, cold: bool, streamed: str) -> None:
    """The tool is called once, and its result answered in words."""
    fleet.get_ready(cold=cold)
    text, city = python.run(PROGRAM, fleet.v1, MODEL, api, streamed)
    assert text.startswith(f'{TEXT}: "sunny in Paris"')
    assert city == "Paris"
