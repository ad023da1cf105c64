"""A WebSocket to `/v1/realtime` reaches the model's engine; nothing else is upgraded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain
from tests.cortex.raw_http import Wire, bounded, connected, request, until

MODEL = "org/small"
HANDSHAKE = (
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    """In front of an engine that repeats each message after saying hello, and ends with the client."""
    benjy.models[MODEL] = "loaded"
    benjy.engine.answer = repeat
    return await start_cortex([benjy], [{"id": MODEL}], aliases={"voice": MODEL})


@pytest.fixture
async def engine(benjy: V1Neuron, cortex: RunningCortex) -> AsyncIterator[RawEngine]:
    """A scripted engine instead."""
    async with RawEngine().running() as engine:
        benjy.engine_url = engine.url
        yield engine


async def repeat(asked: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=("realtime",))
    await socket.prepare(asked)
    await socket.send_str("hello")
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def idle(cortex: RunningCortex) -> bool:
    return not any(cortex.parts.counts.all_in_flight().values())


@pytest.mark.parametrize("name", [MODEL, "voice"])
async def test_messages_pass_in_both_directions(cortex: RunningCortex, benjy: V1Neuron, name: str) -> None:
    """Text, large audio, ping and close; an alias is replaced in the query."""
    url = f"{cortex.url}/v1/realtime?intent=x&model={quote(name, safe='')}"
    async with cortex.http.ws_connect(url, protocols=("realtime",), max_msg_size=0) as socket:
        assert socket.protocol == "realtime"
        assert await socket.receive_str(timeout=10) == "hello"
        assert not idle(cortex)
        for size in (1, 1000, 100_000, 3_000_000):
            await socket.send_bytes(b"x" * size)
            assert await socket.receive_bytes(timeout=10) == b"x" * size
        await socket.ping()
        await socket.send_str("bye")
        assert await socket.receive_str(timeout=10) == "bye"
    target, headers, _ = benjy.engine.requests[-1]
    assert target in ("/v1/realtime?intent=x&model=org%2Fsmall", "/v1/realtime?intent=x&model=org/small")
    assert "Content-Length" not in headers
    await until(lambda: idle(cortex))


async def test_end_of_either_side_ends_the_other(cortex: RunningCortex, engine: RawEngine) -> None:
    """A client that leaves, an engine that leaves, and bytes that the engine sends with its 101."""
    last = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(ACCEPTED + b"\x81\x02hi")
        if len(engine.requests) > 1:
            wire.close()
        await last.wait()

    engine.script = script
    ask = request(b"", *HANDSHAKE, method="GET", target=f"/v1/realtime?model={MODEL}")
    async with connected(cortex.url) as client:
        await client.send(ask)
        head = await client.head()
        assert head.start == "HTTP/1.1 101 Switching Protocols"
        assert (head.get("upgrade"), head.get("connection")) == ("websocket", "Upgrade")
        assert head.get("x-cortex-node") == "benjy"
        assert await bounded(client.incoming.readexactly(4)) == b"\x81\x02hi"
    await bounded(engine.connections[-1].gone.wait())
    await until(lambda: idle(cortex))
    async with connected(cortex.url) as client:
        await client.send(ask)
        await client.head()
        assert await client.rest() == b"\x81\x02hi"
    await until(lambda: idle(cortex))
    last.set()


async def test_engine_that_refuses(cortex: RunningCortex, engine: RawEngine) -> None:
    """Its answer comes back, and nothing behind it reaches the engine."""
    engine.script = refuse
    async with connected(cortex.url) as client:
        ask = request(b"", *HANDSHAKE, method="GET", target=f"/v1/realtime?model={MODEL}")
        answer = await client.ask(ask + request(b"{}", target="/collective_rpc"), "GET")
        assert (answer.status, answer.body, answer.get("connection")) == (404, b'{"detail": "no"}', "close")
        assert await client.rest() == b""
    assert [received.target for received in engine.requests] == [f"/v1/realtime?model={MODEL}"]


async def refuse(wire: Wire, received: Received) -> None:
    await wire.send(plain(b'{"detail": "no"}', status="404 Not Found"))


async def test_engine_that_accepts_what_was_not_asked(cortex: RunningCortex, engine: RawEngine) -> None:
    """A 101 to an ordinary request is an invalid answer."""

    async def accept(wire: Wire, received: Received) -> None:
        await wire.send(ACCEPTED)

    engine.script = accept
    async with connected(cortex.url) as client:
        answer = await client.ask(request(b'{"model":"org/small"}'))
    assert answer.status == 502


async def test_slow_engine_holds_the_client_back(cortex: RunningCortex, engine: RawEngine) -> None:
    """What the client sends does not pile up in cortex."""
    go_on = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        wire.stop_reading()
        await wire.send(ACCEPTED)
        await go_on.wait()
        wire.read_on()
        await wire.incoming.readexactly(sent)
        await wire.send(b"done")

    engine.script = script
    sent = 0
    async with connected(cortex.url) as client:
        await client.send(request(b"", *HANDSHAKE, method="GET", target=f"/v1/realtime?model={MODEL}"))
        await client.head()
        with contextlib.suppress(asyncio.TimeoutError):
            while sent < 100_000_000:
                client.writer.write(b"x" * 1_000_000)
                sent += 1_000_000
                await bounded(client.writer.drain(), secs=0.5)
        assert sent < 100_000_000, "nothing holds the client back"
        go_on.set()
        assert await bounded(client.incoming.readexactly(4)) == b"done"


async def test_model_is_required(cortex: RunningCortex) -> None:
    async with connected(cortex.url) as client:
        answer = await client.ask(request(b"", *HANDSHAKE, method="GET", target="/v1/realtime"), "GET")
    assert answer.status == 400
    assert b"/v1/realtime?model=MODEL" in answer.body


@pytest.mark.parametrize("default", [MODEL, "voice"])
@pytest.mark.parametrize("query", ["", "?", "?intent=x", "?model="])
async def test_default_model(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron, default: str, query: str
) -> None:
    """A WebSocket without a model goes to `[gateway] default_model`, which may be an alias."""
    benjy.models[MODEL], beast.models["org/other"] = "loaded", "loaded"
    benjy.engine.answer = beast.engine.answer = repeat
    models = [{"id": MODEL}, {"id": "org/other"}]
    cortex = await start_cortex([benjy, beast], models, aliases={"voice": MODEL}, gateway={"default_model": default})
    async with cortex.http.ws_connect(f"{cortex.url}/v1/realtime{query}") as socket:
        assert await socket.receive_str(timeout=10) == "hello"
    target, _, _ = benjy.engine.requests[-1]
    assert target == f"/v1/realtime?{'intent=x&' if 'intent' in query else ''}model=org%2Fsmall"
    async with cortex.http.ws_connect(f"{cortex.url}/v1/realtime?model=org/other") as socket:
        assert await socket.receive_str(timeout=10) == "hello"
    assert beast.engine.requests


@pytest.mark.parametrize("path", ["/realtime", "/v1/v1/realtime", "//v1/realtime", "/v1/realtime/"])
async def test_base_url_with_a_part_too_many_or_too_few(cortex: RunningCortex, benjy: V1Neuron, path: str) -> None:
    async with cortex.http.ws_connect(f"{cortex.url}{path}?model={MODEL}") as socket:
        assert await socket.receive_str(timeout=10) == "hello"
    assert benjy.engine.requests[-1][0].startswith("/v1/realtime?model=")


async def test_other_paths_are_not_upgraded(cortex: RunningCortex) -> None:
    async with connected(cortex.url) as client:
        answer = await client.ask(request(b"", *HANDSHAKE, method="GET", target="/v1/responses"), "GET")
    assert answer.status == 426


async def test_a_websocket_ends_with_its_key(start_cortex: StartCortex, benjy: V1Neuron, tmp_path: Path) -> None:
    """It could stay open for days, long after the key was revoked. Those of other keys stay."""
    benjy.models[MODEL] = "loaded"
    benjy.engine.answer = repeat
    cortex = await start_cortex([benjy], [{"id": MODEL}], keys="bob:sk-bob")
    file, ring = tmp_path / "keys.toml", cortex.parts.keys
    file.write_text('[[keys]]\nname = "alice"\nkey = "sk-alice"\n', encoding="utf-8")
    ring.configure(file, "EUR")
    await until(lambda: len(ring.table.callers) == 2)
    url = f"{cortex.url}/v1/realtime?model={quote(MODEL, safe='')}"
    async with contextlib.AsyncExitStack() as stack:
        alice, bob = [
            await stack.enter_async_context(cortex.http.ws_connect(url, headers={"x-api-key": key}))
            for key in ("sk-alice", "sk-bob")
        ]
        for socket in (alice, bob):
            assert await socket.receive_str(timeout=10) == "hello"
        file.write_text("", encoding="utf-8")
        ended = await alice.receive(timeout=10)
        assert ended.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
        await bob.send_str("still here")
        assert await bob.receive_str(timeout=10) == "still here"
    await until(lambda: idle(cortex))
