"""A translated answer on its way to the client: counted, logged, kept alive and cut off as any other."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.translation.chat_engine import STREAM, ChatEngine, chunk, events
from tests.cortex.raw_engine import Received, closing, plain, stream_head
from tests.cortex.raw_http import Answer, RawClient, Truncated, Wire, bounded, chunked, connected, request

MODEL = "org/small"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[ChatEngine]:
    async with ChatEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine  # type: ignore[misc]


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: ChatEngine) -> RunningCortex:
    """Breaks silence after 0.2 s."""
    return await start_cortex([benjy], [{"id": MODEL}], gateway={"keepalive_secs": 0.2}, aliases={"small": MODEL})


def asking(path: str = "/v1/messages", *lines: str, version: str = "HTTP/1.1", **fields: Any) -> bytes:
    body = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], **fields}
    return request(json.dumps(body).encode(), *lines, target=path, version=version)


async def ask(client: RawClient, **fields: Any) -> Answer:
    return await client.ask(asking(**fields))


async def known(client: RawClient) -> None:
    """cortex knows from now on that the engine lacks the path."""
    assert (await ask(client)).status == 200


async def metrics(cortex: RunningCortex) -> str:
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as answer:
        return await answer.text()


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_and_requests_are_counted(cortex: RunningCortex, engine: ChatEngine, stream: bool) -> None:
    """One request at one engine, although it was sent twice."""
    async with connected(cortex.url) as client:
        await ask(client, stream=stream)
        await client.ask(request(method="GET", target="/health"), "GET")  # counted by now
    page = await metrics(cortex)
    assert f'cortex_tokens_total{{kind="prompt",model="{MODEL}",node="benjy"}} 7.0' in page
    assert f'cortex_tokens_total{{kind="completion",model="{MODEL}",node="benjy"}} 2.0' in page
    assert f'cortex_requests_total{{model="{MODEL}",node="benjy",status="200"}} 1.0' in page
    assert len(engine.requests) == 2


async def test_engine_gets_ids_and_its_own_path(client: RawClient, engine: ChatEngine) -> None:
    """The request id, the real model name of an alias, no compression, and the engine's path without Anthropic's
    query."""
    await client.ask(asking("/v1/messages?beta=true", "x-request-id: abc", "accept-encoding: gzip", model="small"))
    sent = engine.requests[-1]
    assert (sent.target, sent.get("x-request-id"), sent.get("accept-encoding")) == (
        "/v1/chat/completions",
        "abc",
        "identity",
    )
    assert engine.chat["model"] == MODEL


async def test_engines_error_keeps_its_status(client: RawClient, engine: ChatEngine) -> None:
    engine.completion = plain(b'{"error": {"message": "too long", "code": 400}}', status="400 Bad Request")
    answer = await ask(client)
    assert (answer.status, answer.get("content-type")) == (400, "application/json")
    assert json.loads(answer.body) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "too long"},
    }


async def test_error_instead_of_a_stream(client: RawClient, engine: ChatEngine) -> None:
    engine.stream = plain(b'{"error": {"message": "too long", "code": 400}}', status="400 Bad Request")
    answer = await ask(client, stream=True)
    assert (answer.status, json.loads(answer.body)["error"]["message"]) == (400, "too long")


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_stream_lost_at_every_event_ends_in_an_error(
    cortex: RunningCortex, engine: ChatEngine, version: str
) -> None:
    """All events are whole, and the last says upstream_lost in Anthropic's shape."""
    async with connected(cortex.url) as client:
        await known(client)
    for kept in range(0, len(STREAM) - len(b"data: [DONE]\n\n"), 45):
        engine.scripts.append(closing(stream_head(), chunked(STREAM[:kept], 50).removesuffix(b"0\r\n\r\n")))
        async with connected(cortex.url) as client:
            answer = await client.ask(asking(stream=True, version=version))
        last = answer.body.split(b"\n\n")[-2]
        assert last.startswith(b"event: error\ndata: "), answer.body
        assert json.loads(last.partition(b"data: ")[2])["error"]["code"] == "upstream_lost"
        assert b"message_stop" not in answer.body


async def test_whole_answer_that_is_lost_is_cut(client: RawClient, engine: ChatEngine) -> None:
    await known(client)
    engine.scripts.append(closing(engine.completion[:-9]))
    with pytest.raises(Truncated):
        await ask(client)


async def test_silence_is_broken(client: RawClient, engine: ChatEngine) -> None:
    """Before the engine's head and between its events the client gets pings, and then the same stream."""
    await known(client)

    async def paced(wire: Wire, received: Received) -> None:
        await asyncio.sleep(0.8)
        begun = events(chunk({"content": "Hi"}))
        await wire.send(stream_head() + chunked(begun, 1000).removesuffix(b"0\r\n\r\n"))
        await asyncio.sleep(0.8)
        await wire.send(chunked(STREAM[len(events(chunk({"role": "assistant", "content": ""}))) :], 1000))

    engine.scripts.append(paced)
    answer = await ask(client, stream=True)
    before, _, after = answer.body.partition(b'"Hi"')
    assert before.count(PING) >= 1
    assert after.count(PING) >= 1
    assert answer.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_engine_that_ignores_stream_after_a_ping(client: RawClient, engine: ChatEngine, path: str) -> None:
    """The stream has begun by the time the engine answers with JSON."""
    await client.ask(asking(path, input="hi"))

    async def late(wire: Wire, received: Received) -> None:
        await asyncio.sleep(0.8)
        await wire.send(engine.completion)

    engine.scripts.append(late)
    answer = await client.ask(asking(path, input="hi", stream=True))
    assert b": request sent to org/small on benjy" in answer.body
    assert b'"Hi there"' in answer.body
    assert b'"error":{' not in answer.body
    last = b"message_stop" if path == "/v1/messages" else b"response.completed"
    assert answer.body.split(b"\n\n")[-2].startswith(b"event: " + last)


async def test_error_after_a_ping_is_an_event(client: RawClient, engine: ChatEngine) -> None:
    """The status has been sent by then."""
    await known(client)

    async def late(wire: Wire, received: Received) -> None:
        await asyncio.sleep(0.8)
        await wire.send(plain(b'{"error": {"message": "too long", "code": 400}}', status="400 Bad Request"))

    engine.scripts.append(late)
    answer = await ask(client, stream=True)
    assert answer.status == 200
    name, data = answer.body.split(b"\n\n")[-2].split(b"\n")
    assert name == b"event: error"
    assert json.loads(data[6:])["error"] == {"type": "invalid_request_error", "message": "too long"}


async def test_path_that_is_missed_after_a_ping(client: RawClient, engine: ChatEngine) -> None:
    """The stream has begun by the time the engine says that it lacks the path."""

    async def late(wire: Wire, received: Received) -> None:
        await asyncio.sleep(0.8)
        await wire.send(engine.missing)

    engine.scripts.append(late)
    answer = await ask(client, stream=True)
    assert PING in answer.body
    assert answer.body.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


async def test_client_that_leaves_stops_the_engine(cortex: RunningCortex, engine: ChatEngine) -> None:
    async with connected(cortex.url) as client:
        await known(client)
        begun = asyncio.Event()
        gone: list[Wire] = []

        async def endless(wire: Wire, received: Received) -> None:
            await wire.send(stream_head() + chunked(events(chunk({"content": "Hi"})), 1000).removesuffix(b"0\r\n\r\n"))
            gone.append(wire)
            begun.set()
            await bounded(wire.gone.wait())

        engine.scripts.append(endless)
        await client.send(asking(stream=True))
        await bounded(begun.wait())
    await bounded(gone[0].gone.wait())


async def test_access_line(cortex: RunningCortex, engine: ChatEngine, caplog: pytest.LogCaptureFixture) -> None:
    """One line says once that the engine lacks the path."""
    with caplog.at_level(logging.INFO):
        async with connected(cortex.url) as client:
            await known(client)
            await known(client)
    lines = [record.getMessage() for record in caplog.records if "has no" in record.getMessage()]
    assert lines == [f"{MODEL} on benjy has no /v1/messages: translating"]


async def test_token_count(client: RawClient, engine: ChatEngine) -> None:
    """Estimated where `/tokenize` is missing, exact where it counts. The engine is asked once for each."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 350}]}).encode()
    ask = request(body, target="/v1/messages/count_tokens")
    for _ in range(3):
        estimated = json.loads((await client.ask(ask)).body)
        assert estimated == {"input_tokens": 104, "estimated": True}
    engine.lacks.remove("/tokenize")
    engine.native = plain(b'{"count": 42, "max_model_len": 100, "tokens": [1]}')
    answer = await client.ask(ask)
    assert (answer.status, json.loads(answer.body)) == (200, {"input_tokens": 42})
    assert engine.paths == ["/v1/messages/count_tokens", *["/tokenize"] * 4]
