"""The anthropic package for Python."""

from __future__ import annotations

import pytest

from tests.clients.fleet import ALIAS, MODEL, TEXT, ClientFleet
from tests.clients.programs import PythonClients

PROGRAM = """
import json, sys, anthropic
url, model, streamed = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=30)
asked = {"model": model, "max_tokens": 500, "messages": [{"role": "user", "content": "Hello"}]}
if streamed == "yes":
    with client.messages.stream(**asked) as stream:
        answer = stream.get_final_message()
else:
    answer = client.messages.create(**asked)
listed = [model.id for model in client.models.list()]
counted = client.messages.count_tokens(model=model, messages=asked["messages"]).input_tokens
print(json.dumps([answer.content[0].text, answer.stop_reason, answer.usage.input_tokens, counted, listed]))
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, python: PythonClients, cold: bool, streamed: str) -> None:
    """An answer, its tokens, and the list of models with the alias."""
    fleet.get_ready(cold=cold)
    text, end, used, counted, listed = python.run(PROGRAM, fleet.url, MODEL, streamed)
    assert text.startswith(f'{TEXT}: "Hello"')
    assert (end, used) == ("end_turn", counted)
    assert {MODEL, ALIAS} <= set(listed)
