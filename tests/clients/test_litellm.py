"""litellm as a client, in both dialects."""

from __future__ import annotations

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import PythonClients

PROGRAM = """
import json, sys, litellm
litellm.telemetry = False
url, model, streamed = sys.argv[1:]
found = []
for provider, base in (("openai", url + "/v1"), ("anthropic", url)):
    asked = {"model": f"{provider}/{model}", "api_base": base, "api_key": "none", "num_retries": 0, "timeout": 30,
             "max_tokens": 500, "messages": [{"role": "user", "content": "Hello"}]}
    if streamed == "yes":
        chunks = list(litellm.completion(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found.append([text, chunks[-1].choices[0].finish_reason])
    else:
        [choice] = litellm.completion(**asked).choices
        found.append([choice.message.content, choice.finish_reason])
print(json.dumps(found))
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, python: PythonClients, cold: bool, streamed: str) -> None:
    """`openai/MODEL` needs the URL with /v1; `anthropic/MODEL` without, and max_tokens: its default is 128000."""
    fleet.get_ready(cold=cold)
    found = python.run(PROGRAM, fleet.url, MODEL, streamed)
    assert [end for _, end in found] == ["stop", "stop"]
    assert all(text.startswith(f'{TEXT}: "Hello"') for text, _ in found)
