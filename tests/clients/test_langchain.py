"""langchain-openai."""

from __future__ import annotations

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import PythonClients

PROGRAM = """
import json, sys
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
url, model, streamed = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=url, api_key="none", max_retries=0, timeout=30)
if streamed == "yes":
    text = "".join(chunk.content for chunk in chat.stream("Hello"))
else:
    text = chat.invoke("Hello").content

class Weather(BaseModel):
    "The weather in a city."
    city: str
    days: int

question = "What is the weather in Paris?"
[call] = chat.bind_tools([Weather]).invoke(question).tool_calls
found = chat.with_structured_output(Weather).invoke(question)
print(json.dumps([text, call["name"], call["args"], found.city]))
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, python: PythonClients, cold: bool, streamed: str) -> None:
    """Text, a tool call, and structured output."""
    fleet.get_ready(cold=cold)
    text, tool, arguments, city = python.run(PROGRAM, fleet.v1, MODEL, streamed)
    assert text.startswith(f'{TEXT}: "Hello"')
    assert (tool, arguments["city"]) == ("Weather", "Paris")
    assert city == "Paris"
