"""@anthropic-ai/sdk."""

from __future__ import annotations

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients

PROGRAM = """
import Anthropic from "@anthropic-ai/sdk";
const [url, model, streamed] = process.argv.slice(1);
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 30000 });
const asked = { model, max_tokens: 500, messages: [{ role: "user", content: "Hello" }] };
const answer = streamed === "yes"
  ? await client.messages.stream(asked).finalMessage()
  : await client.messages.create(asked);
console.log(JSON.stringify([answer.content[0].text, answer.stop_reason]));
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_answers(fleet: ClientFleet, node: NodeClients, cold: bool, streamed: str) -> None:
    fleet.get_ready(cold=cold)
    text, end = node.run(PROGRAM, fleet.url, MODEL, streamed)
    assert text.startswith(f'{TEXT}: "Hello"')
    assert end == "end_turn"
