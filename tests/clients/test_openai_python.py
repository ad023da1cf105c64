"""The openai package for Python."""

from __future__ import annotations

import pytest

from tests.clients.fleet import BROKEN, MODEL, TEXT, ClientFleet
from tests.clients.programs import PythonClients

PROGRAM = """
import json, sys, openai
url, model, api, streamed = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)
hello = [{"role": "user", "content": "Hello"}]
if api == "chat" and streamed == "yes":
    chunks = list(client.chat.completions.create(model=model, messages=hello, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    end = chunks[-1].choices[0].finish_reason
elif api == "chat":
    answer = client.chat.completions.create(model=model, messages=hello)
    text, end = answer.choices[0].message.content, answer.choices[0].finish_reason
elif streamed == "yes":
    with client.responses.stream(model=model, input="Hello") as stream:
        final = stream.get_final_response()
    text, end = final.output_text, final.status
else:
    final = client.responses.create(model=model, input="Hello")
    text, end = final.output_text, final.status
print(json.dumps([text, end]))
"""

FAILING = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=30)
try:
    for _ in client.chat.completions.create(
        model=sys.argv[2], messages=[{"role": "user", "content": "Hello"}], stream=True
    ):
        pass
except openai.APIError as error:
    print(json.dumps([type(error).__name__, error.message]))
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_answers(fleet: ClientFleet, python: PythonClients, api: str, cold: bool, streamed: str) -> None:
    fleet.get_ready(cold=cold)
    text, ended = python.run(PROGRAM, fleet.v1, MODEL, api, streamed)
    assert text.startswith(f'{TEXT}: "Hello"')
    assert ended == ("stop" if api == "chat" else "completed")


def test_a_failed_load_raises(fleet: ClientFleet, python: PythonClients) -> None:
    """With the reason, in the middle of a stream or before it."""
    _, message = python.run(FAILING, fleet.v1, BROKEN["python"])
    assert "CUDA out of memory" in message
