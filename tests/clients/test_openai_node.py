"""The openai package for Node."""

from __future__ import annotations

import pytest

from tests.clients.fleet import BROKEN, MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients

PROGRAM = """
import OpenAI from "openai";
const [url, model, api, streamed] = process.argv.slice(1);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 30000 });
const messages = [{ role: "user", content: "Hello" }];
let text = "", end = null;
if (api === "chat" && streamed === "yes") {
  for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    end = chunk.choices[0]?.finish_reason ?? end;
  }
} else if (api === "chat") {
  const [choice] = (await client.chat.completions.create({ model, messages })).choices;
  [text, end] = [choice.message.content, choice.finish_reason];
} else {
  const asked = { model, input: "Hello" };
  const final = streamed === "yes"
    ? await client.responses.stream(asked).finalResponse()
    : await client.responses.create(asked);
  [text, end] = [final.output_text, final.status];
}
console.log(JSON.stringify([text, end]));
"""

FAILING = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[1], apiKey: "none", timeout: 30000 });
try {
  const asked = { model: process.argv[2], messages: [{ role: "user", content: "Hello" }], stream: true };
  for await (const chunk of await client.chat.completions.create(asked));
} catch (error) {
  console.log(JSON.stringify(error.message));
}
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_answers(fleet: ClientFleet, node: NodeClients, api: str, cold: bool, streamed: str) -> None:
    fleet.get_ready(cold=cold)
    text, ended = node.run(PROGRAM, fleet.v1, MODEL, api, streamed)
    assert text.startswith(f'{TEXT}: "Hello"')
    assert ended == ("stop" if api == "chat" else "completed")


def test_a_failed_load_throws(fleet: ClientFleet, node: NodeClients) -> None:
    assert "CUDA out of memory" in node.run(FAILING, fleet.v1, BROKEN["node"])
