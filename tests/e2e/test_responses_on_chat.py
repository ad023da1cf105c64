"""The openai package's `responses` on an engine with only `/v1/chat/completions`: real cortex, neuron and engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import FunctionToolParam, ToolParam
from pydantic import BaseModel

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/chat-only"
NODE = "n"
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=["chat-only", "chat-only-405"])
async def client(mark: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', f'name = "{NODE}"')
    args = ["--fault", request.param, "--load-secs", "0.1", "--tokens-per-sec", "2000"]
    models = [{"id": MODEL, "harness": "sim", "vram_mb": 4000, "tools": True, "args": args}]
    async with (
        neuron_process(config),
        cortex_process(tmp_path, [neuron_at(port)], models) as cortex,
        openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


async def test_the_openai_package_works(client: openai.AsyncOpenAI) -> None:
    """Words, streams, tools and their results, structured output: cold first, then warm."""
    answer = await client.responses.create(model=MODEL, input="Say hello", instructions="Be brief.", store=True)
    assert answer.output_text.startswith(f'{MODEL} (simulated): "Say hello"')
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 20
    await _streams(client, answer.output_text)
    await _calls(client)
    parsed = await client.responses.parse(model=MODEL, input="Who?", text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    short = await client.responses.create(model=MODEL, input="Say hello", max_output_tokens=3)
    assert short.incomplete_details is not None
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


async def _streams(client: openai.AsyncOpenAI, text: str) -> None:
    deltas = []
    async with client.responses.stream(model=MODEL, input="Say hello", instructions="Be brief.") as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                deltas.append(event.delta)
        final = await stream.get_final_response()
    assert len(deltas) > 5
    assert "".join(deltas) == final.output_text == text
    assert final.usage is not None


async def _calls(client: openai.AsyncOpenAI) -> None:
    """One round: the model calls, the client answers."""
    patch: ToolParam = {"type": "custom", "name": "apply_patch", "format": {"type": "text"}}
    asked: Any = [{"role": "user", "content": 'What is the weather in "Paris"?'}]
    first = await client.responses.create(model=MODEL, input=asked, tools=[WEATHER, patch])
    [call] = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}
    asked += [item.model_dump() for item in first.output]
    asked.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = await client.responses.create(model=MODEL, input=asked, tools=[WEATHER, patch])
    assert '"sunny"' in second.output_text
    async with client.responses.stream(model=MODEL, input='Apply the patch "+x"', tools=[WEATHER, patch]) as stream:
        final = await stream.get_final_response()
    assert final.output[0].type == "custom_tool_call"
    assert final.output[0].input == "+x"


async def test_what_needs_a_store_is_refused(client: openai.AsyncOpenAI) -> None:
    """The error names the field and the engine; nothing pretends to be stored."""
    answer = await client.responses.create(model=MODEL, input="Say hello")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=MODEL, input="And?", previous_response_id=answer.id)
    assert refused.value.param == "previous_response_id"
    assert f"{MODEL} on {NODE} has no /v1/responses" in refused.value.message
    for request in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="only /v1/chat/completions and stores nothing"):
            await request(answer.id)
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        await client.responses.create(model=MODEL, input="Say hello", max_output_tokens=10_000_000)
