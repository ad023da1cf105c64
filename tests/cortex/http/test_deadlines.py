"""Deadlines for clients, idle connections, and draining on shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import pair
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, stream_head
from tests.cortex.raw_http import Wire, bounded, connected, request

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')


@pytest.fixture(params=["one-worker", "one-worker-tls", "two-workers"])
async def process(
    request: pytest.FixtureRequest, tmp_path: Path, benjy: V1Neuron, engine: RawEngine
) -> AsyncIterator[CortexProcess]:
    """A cortex in its own process, with the default drain timeout."""
    tls = pair(tmp_path).gateway if request.param.endswith("-tls") else {}
    workers = 2 if request.param == "two-workers" else 1
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], workers=workers, **tls) as process:
        yield process


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, start_cortex: StartCortex) -> StartCortex:
    """Starts cortexes with one of the server's deadlines shortened."""

    async def start(neurons: list[V1Neuron], models: list[dict[str, Any]], *, setting: str) -> RunningCortex:
        monkeypatch.setattr(f"cortex.http.connection.{setting}", 0.3)
        return await start_cortex(neurons, models)

    return start


class Held:
    """An event stream that begins, and continues when the test says so."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, wire: Wire, received: Received) -> None:
        await wire.send(stream_head() + b"9\r\ndata: 1\n\n\r\n")
        await bounded(self.go_on.wait())
        await wire.send(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def refuses(url: str) -> bool:
    """True if a new client cannot connect, or is disconnected without an answer."""
    try:
        async with connected(url) as client:
            await client.send(ASK)
            return await client.rest() == b""
    except ConnectionError:
        return True


async def test_stop_lets_a_stream_finish(process: CortexProcess, engine: RawEngine) -> None:
    """SIGTERM: cortex accepts no new client, the stream in flight ends normally, then the process exits with 0 without
    waiting for idle connections."""
    held = Held()
    engine.scripts.append(held)
    async with connected(process.url) as client, connected(process.url) as idle, connected(process.url) as fresh:
        await client.send(ASK)
        await engine.next_request()
        assert json.loads((await idle.ask(ASK)).body)["n"] == 1
        process.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        assert await fresh.rest() == b""
        while not await refuses(process.url):  # each worker gets the signal on its own
            pass
        assert process.process.returncode is None
        held.go_on.set()
        answer = await client.answer()
        assert answer.body == b"data: 1\n\ndata: [DONE]\n\n"
        assert await client.rest() == b""
        assert await process.ended() == 0


async def test_stop_lets_a_plain_request_finish(process: CortexProcess, engine: RawEngine) -> None:
    """A request without a byte of its answer yet gets the answer, and `Connection: close`."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def later(wire: Wire, received: Received) -> None:
        asked.set()
        await bounded(go_on.wait())
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    engine.script = later
    async with connected(process.url) as client, connected(process.url) as idle:
        await client.send(ASK)
        await bounded(asked.wait())
        process.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        go_on.set()
        answer = await client.answer()
        assert (answer.status, answer.body, (answer.get("connection") or "").lower()) == (200, b"{}", "close")
        assert await client.rest() == b""
        assert await process.ended() == 0


async def test_stop_is_prompt_without_work(process: CortexProcess) -> None:
    """cortex closes idle connections, used before or not, at once and not after the drain timeout."""
    async with connected(process.url) as idle, connected(process.url) as fresh:
        assert (await idle.ask(ASK)).status == 200
        began = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        assert await fresh.rest() == b""
        assert await process.ended() == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("workers", [1, 2])
async def test_stop_cuts_what_does_not_finish(tmp_path: Path, benjy: V1Neuron, engine: RawEngine, workers: int) -> None:
    """After `drain_timeout_secs` a stream ends with an error and no `[DONE]`, a plain answer is cut, a request without
    a first byte is refused, and the process exits."""

    async def begun(wire: Wire, received: Received) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{")
        await asyncio.Event().wait()

    async def silent(wire: Wire, received: Received) -> None:
        await asyncio.Event().wait()

    settings: dict[str, Any] = {"drain_timeout_secs": 0.3, "workers": workers}
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], **settings) as process:
        async with (
            connected(process.url) as streaming,
            connected(process.url) as reading,
            connected(process.url) as waiting,
            connected(process.url) as sending,
        ):
            for client, script in ((streaming, Held()), (reading, begun), (waiting, silent)):
                engine.scripts.append(script)
                await client.send(ASK)
                await engine.next_request()
            await sending.send(ASK[:-3])
            await reading.head()
            process.process.send_signal(signal.SIGTERM)
            body = (await streaming.answer()).body
            assert body.startswith(b"data: 1\n\n")
            assert json.loads(body.rpartition(b"data: ")[2])["error"]["message"].endswith("cortex is stopping")
            with pytest.raises(ConnectionResetError):
                await reading.incoming.readexactly(20)
            for client in (waiting, sending):
                answer = await client.answer()
                assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "cortex_stopping")
        assert await process.ended() == 0


@pytest.mark.parametrize(
    ("setting", "sent"),
    [("HEAD_TIMEOUT_SECS", ASK[:30]), ("BODY_TIMEOUT_SECS", ASK[:-3]), ("KEEP_ALIVE_SECS", b"")],
    ids=["half-a-head", "half-a-body", "nothing"],
)
async def test_client_that_stops_sending_times_out(
    brief: StartCortex, benjy: V1Neuron, engine: RawEngine, setting: str, sent: bytes
) -> None:
    """A client that sends half a head, half a body or nothing for too long gets at most a 408, then a close. Streams
    have no deadline."""
    cortex = await brief([benjy], [{"id": MODEL}], setting=setting)
    held = Held()
    engine.scripts.append(held)
    async with connected(cortex.url) as busy, connected(cortex.url) as client:
        await busy.send(ASK)
        await busy.head()
        await client.send(sent)
        assert (await client.rest())[9:12] in ((b"408", b"") if sent else (b"",))
        held.go_on.set()
        assert await bounded(busy.incoming.readuntil(b"0\r\n\r\n"))
    assert len(engine.requests) == 1


async def test_head_that_drips_times_out(brief: StartCortex, benjy: V1Neuron, engine: RawEngine) -> None:
    """Sending a byte now and then does not help: the deadline is for the whole head."""
    cortex = await brief([benjy], [{"id": MODEL}], setting="HEAD_TIMEOUT_SECS")
    async with connected(cortex.url) as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
        began = time.monotonic()
        while not client.gone.is_set():
            assert time.monotonic() - began < 8
            await client.send(b"x")
            with contextlib.suppress(asyncio.TimeoutError):
                await bounded(client.gone.wait(), secs=0.05)
    assert engine.requests == []
