"""The Responses API through cortex to an engine that has only chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_keep_alive import without_signs
from tests.cortex.proxy.test_relay_usage import metrics, tokens
from tests.cortex.proxy.translation.chat_engine import ChatEngine, chunk, events
from tests.cortex.proxy.translation.test_responses_answer import events_of
from tests.cortex.raw_engine import closing, plain, stream_head
from tests.cortex.raw_http import RawClient, bounded, connected, read_body, request

MODEL = "org/small"


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[ChatEngine]:
    async with ChatEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine  # type: ignore[misc]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], aliases={"large": MODEL})


def asking(**fields: Any) -> bytes:
    return request(json.dumps({"model": MODEL, "input": "hi", **fields}).encode(), target="/v1/responses")


async def until_counted(cortex: RunningCortex, expected: dict[str, float]) -> None:
    """cortex counts when it sees the end, which may be a moment after the client has it."""
    while tokens(await metrics(cortex)) != expected:
        pass


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_and_counts(cortex: RunningCortex, client: RawClient, engine: ChatEngine, stream: bool) -> None:
    """An alias is resolved, the engine is asked once for what it lacks, and cortex counts the tokens."""
    for _ in range(2):
        answer = await client.ask(asking(model="large", stream=stream, instructions="y" * 5000))
        assert answer.status == 200, answer.body
        response = events_of(answer.body)[-1]["response"] if stream else json.loads(answer.body)
        assert response["output"][0]["content"][0]["text"] == "Hi there"
        assert response["model"] == MODEL
        assert answer.get("x-cortex-node") == "benjy"
    assert engine.paths == ["/v1/responses", *["/v1/chat/completions"] * 2]
    assert [message["role"] for message in engine.chat["messages"]] == ["system", "user"]
    await bounded(until_counted(cortex, {"prompt": 14.0, "completion": 4.0}))


async def test_engine_lost_in_the_middle_of_a_stream(client: RawClient, engine: ChatEngine) -> None:
    """The error event continues what came before: the same response, the next number."""
    sent = events(chunk({"role": "assistant", "content": ""}), chunk({"content": "Hi"}))
    begun = stream_head() + b"%x\r\n%b\r\n" % (len(sent), sent)
    await client.ask(asking())  # the engine is known to lack the path
    engine.scripts.append(closing(begun))
    found = events_of((await client.ask(asking(stream=True))).body)
    assert [event["type"] for event in found][-2:] == ["response.output_text.delta", "response.failed"]
    assert found[-1]["response"]["error"]["code"] == "upstream_lost"


async def test_errors_of_the_engine_keep_their_status(client: RawClient, engine: ChatEngine) -> None:
    """A context that is too long, for example."""
    body = b'{"error": {"message": "too long", "type": "BadRequestError", "param": "input_tokens", "code": 400}}'
    engine.completion = engine.stream = plain(body, status="400 Bad Request")
    for stream in (False, True):
        answer = await client.ask(asking(stream=stream))
        assert (answer.status, json.loads(answer.body)) == (400, json.loads(body))


async def test_what_cannot_be_translated_is_refused(client: RawClient, engine: ChatEngine) -> None:
    """With the field, the engine and what to do."""
    answer = await client.ask(asking(previous_response_id="resp_1"))
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["param"]) == (400, "previous_response_id")
    assert "send the whole conversation in `input`" in error["message"]
    assert f"{MODEL} on benjy has no /v1/responses" in error["message"]
    assert engine.paths == ["/v1/responses"]


async def test_input_tokens(client: RawClient, engine: ChatEngine) -> None:
    """Estimated where `/tokenize` is missing, exact where it counts; the engine's error has OpenAI's shape."""
    engine.lacks.add("/v1/responses/input_tokens")
    ask = request(json.dumps({"model": MODEL, "input": "x" * 350}).encode(), target="/v1/responses/input_tokens")
    assert json.loads((await client.ask(ask)).body) == {
        "object": "response.input_tokens",
        "input_tokens": 104,
        "estimated": True,
    }
    engine.lacks.remove("/tokenize")
    engine.native = plain(b'{"count": 42, "max_model_len": 100, "tokens": [1]}')
    assert json.loads((await client.ask(ask)).body) == {"object": "response.input_tokens", "input_tokens": 42}
    engine.native = plain(b"{}", status="500 Internal Server Error")
    answer = await client.ask(ask)
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (500, "api_error")


async def test_compact(client: RawClient, engine: ChatEngine) -> None:
    """Goes to an engine that has it; one with only chats is named in the error."""
    ask = request(json.dumps({"model": MODEL, "input": "a"}).encode(), target="/v1/responses/compact")
    assert json.loads((await client.ask(ask)).body)["native"]
    engine.lacks.add("/v1/responses/compact")
    answer = await client.ask(ask)
    assert answer.status == 400
    assert f"{MODEL} on benjy has only /v1/chat/completions" in json.loads(answer.body)["error"]["message"]


async def test_a_stream_that_waited_is_refused_for_good(
    start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine
) -> None:
    """Its head was sent during the load, so the refusal is its last event. Codex repeats every code but this one."""
    benjy.models.clear()
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], [{"id": MODEL}], waiting={"first_comment_secs": 0.01})
    async with connected(cortex.url) as client:
        await client.send(asking(stream=True, previous_response_id="resp_1"))
        assert (await client.head()).start == "HTTP/1.1 200 OK"
        benjy.load_gate.set()
        event = without_signs(await read_body(client.incoming, "chunked", 0)).decode()
    data = json.loads(event.partition("data: ")[2])
    assert data["response"]["error"]["code"] == "invalid_prompt"
    assert "previous_response_id" in data["error"]["message"]
