"""The Vercel AI SDK: ai with @ai-sdk/openai-compatible."""

from __future__ import annotations

import pytest

from tests.clients.fleet import BROKEN, MODEL, TEXT, ClientFleet
from tests.clients.programs import NodeClients

PROGRAM = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
const [baseURL, name, streamed] = process.argv.slice(1);
const model = createOpenAICompatible({ name: "cortex", baseURL, apiKey: "none" })(name);
const asked = {
  model,
  maxRetries: 0,
  prompt: "What is the weather in Paris?",
  stopWhen: stepCountIs(5),
  tools: {
    get_weather: tool({
      inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
      execute: async ({ city }) => `sunny in ${city}`,
    }),
  },
};
const result = streamed === "yes" ? streamText(asked) : await generateText(asked);
console.log(JSON.stringify([await result.text, await result.finishReason, (await result.steps).length]));
"""

FAILING = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";
const model = createOpenAICompatible({ name: "cortex", baseURL: process.argv[1], apiKey: "none" })(process.argv[2]);
const errors = [];
const result = streamText({ model, maxRetries: 0, prompt: "Hello", onError: ({ error }) => errors.push(error) });
await result.consumeStream();
console.log(JSON.stringify(errors.map((error) => error.message ?? String(error))));
"""


@pytest.mark.parametrize("streamed", ["yes", "no"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_a_tool_is_called_and_its_result_answered(
    fleet: ClientFleet, node: NodeClients, cold: bool, streamed: str
) -> None:
    fleet.get_ready(cold=cold)
    text, end, steps = node.run(PROGRAM, fleet.v1, MODEL, streamed)
    assert text.startswith(f'{TEXT}: "sunny in Paris"')
    assert (end, steps) == ("stop", 2)


def test_a_failed_load_is_an_error(fleet: ClientFleet, node: NodeClients) -> None:
    [message] = node.run(FAILING, fleet.v1, BROKEN["vercel"])
    assert "CUDA out of memory" in message
