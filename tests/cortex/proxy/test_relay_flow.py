"""Back-pressure, bounded memory and clients that disconnect, with a cortex in a process of its own and one in this
loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.serve import bind
from tests.certificates import pair
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, Script, echo_number, plain, stream_head
from tests.cortex.raw_http import RawClient, Wire, bounded, connected, request, settled, until

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')
MIB = 1 << 20
PIECE = b"data: " + b"x" * (1 << 18) + b"\n\n"


@pytest.fixture
async def process(tmp_path: Path, benjy: V1Neuron, engine: RawEngine) -> AsyncIterator[CortexProcess]:
    """A cortex that has answered one request, so its memory includes what that takes."""
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}]) as process:
        await answers(process.url)
        yield process


@pytest.fixture(scope="module")
def engine_socket() -> Iterator[socket.socket]:
    """Where the engine of each test listens, so that a cortex finds the next one at the same address."""
    with bind("127.0.0.1", 0) as sock:
        yield sock


@pytest.fixture
async def engine(benjy: V1Neuron, engine_socket: socket.socket) -> AsyncIterator[RawEngine]:
    async with RawEngine().running(engine_socket.dup()) as engine:
        benjy.models[MODEL] = "loaded"
        benjy.engine_url = engine.url
        yield engine


async def run_cortexes(
    directory: Path, engine_url: str, started: Future[dict[str, str]], ended: threading.Event
) -> None:
    """Runs a neuron and cortexes in front of it until `ended`; `started` gets the address of each kind of cortex."""
    kinds: dict[str, dict[str, Any]] = {
        "process": {},
        "process-tls": pair(directory).gateway,
        "two-workers": {"workers": 2},
    }
    async with V1Neuron("benjy", 24000).running() as neuron, contextlib.AsyncExitStack() as stack:
        neuron.models[MODEL] = "loaded"
        neuron.engine_url = engine_url
        urls = {}
        for kind, gateway in kinds.items():
            (directory / kind).mkdir()
            cortex = cortex_process(directory / kind, [neuron], [{"id": MODEL}], **gateway)
            urls[kind] = (await stack.enter_async_context(cortex)).url
        started.set_result(urls)
        await asyncio.to_thread(ended.wait)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory, engine_socket: socket.socket) -> Iterator[dict[str, str]]:
    """The addresses of cortexes that the tests of this module share, by their kind: a start takes longer than most of
    these tests. They and their neuron have a loop in a thread of its own, because each test has another."""
    host, port = engine_socket.getsockname()
    started: Future[Any] = Future()
    ended = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        directory = tmp_path_factory.mktemp("cortexes")
        running: Future[Any] = executor.submit(
            asyncio.run, run_cortexes(directory, f"http://{host}:{port}", started, ended)
        )
        try:
            futures.wait((started, running), return_when=futures.FIRST_COMPLETED)
            if running.done():
                running.result()  # raises
            yield started.result()
        finally:
            ended.set()
        running.result()


@pytest.fixture(params=["in-loop", "process", "process-tls", "two-workers"])
async def url(request: pytest.FixtureRequest, start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> str:
    """The address of a cortex on asyncio's loop, of one on uvloop, of one with TLS, and of one with two workers."""
    if request.param == "in-loop":
        return (await start_cortex([benjy], [{"id": MODEL}])).url
    address: str = request.getfixturevalue("urls")[request.param]
    return address


async def answers(url: str) -> None:
    """Checks that cortex answers a simple request."""
    async with connected(url) as client:
        answer = await client.ask(ASK)
    assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)


class Flood:
    """Answers with `size` bytes as fast as the peer reads; `sent` counts the bytes of its body."""

    def __init__(self, size: int, framing: str) -> None:
        self.size, self.framing, self.sent = size, framing, 0

    async def __call__(self, wire: Wire, received: Received) -> None:
        if self.framing == "chunked":
            await wire.send(stream_head())
        else:
            length = f"Content-Length: {self.size}\r\n" if self.framing == "length" else ""
            await wire.send(f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n{length}\r\n".encode())
        while self.sent < self.size:
            piece = PIECE[: self.size - self.sent]
            await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece) if self.framing == "chunked" else piece)
            self.sent += len(piece)
        if self.framing == "chunked":
            await wire.send(b"0\r\n\r\n")
        elif self.framing == "close":
            wire.close()


@contextlib.asynccontextmanager
async def stalled_client(url: str, data: bytes = ASK) -> AsyncIterator[RawClient]:
    """A client that sends a request and reads nothing."""
    async with connected(url, receive_buffer=65536) as client:
        client.stop_reading()
        await client.send(data)
        yield client


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_gigabyte_for_a_client_that_reads_nothing(
    process: CortexProcess, engine: RawEngine, framing: str, version: str
) -> None:
    """The engine's writing stalls, and cortex's memory does not grow."""
    flood = Flood(1 << 30, framing)
    engine.scripts.append(flood)
    before = process.rss_bytes()
    async with stalled_client(process.url, request(b'{"model":"org/small"}', version=version)):
        sent = await settled(lambda: flood.sent)
        grown = process.rss_bytes() - before
        print(f"{framing} {version}: {sent / MIB:.1f} MiB left the engine, memory grew by {grown / MIB:.2f} MiB")
        assert 0 < sent < 100 * MIB, "as much as the kernel's buffers take"
        assert grown < 8 * MIB
        await answers(process.url)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_client_that_reads_on_gets_everything(process: CortexProcess, engine: RawEngine, framing: str) -> None:
    """The stream continues where it stopped and is complete; the connections stay usable."""
    flood = Flood(64 * MIB, framing)
    engine.scripts.append(flood)
    async with stalled_client(process.url) as client:
        await settled(lambda: flood.sent)
        client.read_on()
        answer = await client.answer()
        whole = PIECE * (flood.size // len(PIECE) + 1)
        assert answer.body == whole[: flood.size]
        assert json.loads((await client.ask(ASK)).body)["n"] == 1
    assert len(engine.connections) <= 2


async def test_many_stalled_clients_hold_little(process: CortexProcess, engine: RawEngine) -> None:
    """Each stream holds a bounded amount: forty of them stay small, and other clients are served."""
    floods = [Flood(1 << 30, "chunked") for _ in range(40)]
    engine.scripts.extend(floods)
    before = process.rss_bytes()
    async with contextlib.AsyncExitStack() as stack:
        for _ in floods:
            await stack.enter_async_context(stalled_client(process.url))
        await settled(lambda: sum(flood.sent for flood in floods))
        grown = process.rss_bytes() - before
        print(f"{grown / MIB / len(floods):.3f} MiB for each of {len(floods)} stalled streams")
        assert grown < 40 * MIB
        for _ in range(10):
            await bounded(answers(process.url))
    await until(lambda: len(engine.open_connections) <= 1)


async def test_stalled_client_does_not_delay_others(process: CortexProcess, engine: RawEngine) -> None:
    """Meanwhile another client gets a whole large answer."""
    engine.scripts.extend([Flood(1 << 30, "chunked"), Flood(32 * MIB, "chunked")])
    async with stalled_client(process.url):
        await bounded(engine.next_request())
        async with connected(process.url) as other:
            assert len((await other.ask(ASK)).body) == 32 * MIB


async def silence(wire: Wire, received: Received) -> None:
    await wire.gone.wait()


async def one_event(wire: Wire, received: Received) -> None:
    await wire.send(stream_head() + b"9\r\ndata: 1\n\n\r\n")
    await wire.gone.wait()


async def a_part_of_a_plain_answer(wire: Wire, received: Received) -> None:
    await wire.send(plain(b'{"half": 1}')[:-3])
    await wire.gone.wait()


def leave(client: RawClient, how: str) -> None:
    if how == "rst":
        client.reset()
    elif how == "fin":
        client.close()
    else:
        client.half_close()


async def engine_was_left(engine: RawEngine, left_at: float, case: str) -> None:
    """Checks that the engine's connection ends soon after the client's."""
    wire = engine.connections[engine.requests[-1].connection]
    await bounded(wire.gone.wait())
    took = wire.gone_at - left_at
    print(f"{case}: the engine saw it after {took * 1000:.1f} ms")
    assert took < 30, "not at once"


@pytest.mark.parametrize("script", [silence, one_event, a_part_of_a_plain_answer])
async def test_client_leaves_and_the_engine_sees_it(url: str, engine: RawEngine, script: Script) -> None:
    """cortex closes the engine's connection before and during the answer. Pipelined requests then never reach the
    engine."""
    for how, behind in itertools.product(("fin", "rst", "half-close"), (b"", ASK, ASK * 3)):
        engine.script = script
        seen = len(engine.requests)
        engine.asked.clear()
        async with connected(url) as client:
            await client.send(ASK + behind)
            await engine.next_request()
            if script is not silence:
                assert (await client.head()).start.startswith("HTTP/1.1 200")
            left_at = time.monotonic()
            leave(client, how)
            await engine_was_left(engine, left_at, f"{script.__name__}, {how}, {len(behind)} bytes behind")
        engine.script = echo_number
        await answers(url)
        assert len(engine.requests) == seen + 2, "what the client had sent behind is given up with it"


@pytest.mark.parametrize(("how", "kept"), [("half-close", 100_000), ("rst", 100_000), ("rst", 4 * MIB)])
async def test_client_that_has_sent_far_ahead_leaves(url: str, engine: RawEngine, how: str, kept: int) -> None:
    """A pipelined request too large to be read ahead does not hide the disconnect."""
    ahead = request(json.dumps({"model": MODEL, "pad": "x" * (4 * MIB)}).encode())
    engine.script = one_event
    async with connected(url) as client:
        await client.send(ASK)
        await engine.next_request()
        client.writer.write(ahead[:kept])  # not drained: cortex may never read it
        await settled(client.unread)
        left_at = time.monotonic()
        leave(client, how)
        await engine_was_left(engine, left_at, f"{kept} bytes ahead, {how}")


@pytest.mark.parametrize("how", ["half-close", "rst"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_stalled_client_leaves_and_the_engine_sees_it(
    url: str, engine: RawEngine, framing: str, how: str
) -> None:
    """cortex notices the disconnect even while it holds data that the client has not read."""
    flood = Flood(1 << 30, framing)
    engine.scripts.append(flood)
    async with stalled_client(url) as client:
        await settled(lambda: flood.sent)
        left_at = time.monotonic()
        leave(client, how)
        await engine_was_left(engine, left_at, f"stalled, {framing}, {how}")
    await answers(url)


async def test_client_leaves_while_the_engine_is_streaming(url: str, engine: RawEngine) -> None:
    """A client that reads a fast stream disconnects in the middle, and the engine stops."""
    for how in ("fin", "rst"):
        engine.scripts.append(Flood(1 << 30, "chunked"))
        async with connected(url) as client:
            await client.send(ASK)
            await bounded(client.incoming.readexactly(4 * MIB))
            left_at = time.monotonic()
            leave(client, how)
            await engine_was_left(engine, left_at, how)
    await answers(url)


async def test_upload_to_an_engine_that_does_not_read(process: CortexProcess, engine: RawEngine) -> None:
    """cortex holds a body at most twice and frees it when the client disconnects."""
    body = json.dumps({"model": MODEL, "pad": "x" * (24 * MIB)}).encode()
    fds = process.fds()
    engine.reads = False
    process.reset_peak()
    before = process.rss_bytes()
    async with connected(process.url) as client:
        # The connection that the first request left in the pool is read from; the upload must get one that is not.
        await asyncio.gather(*(_close(wire) for wire in engine.open_connections))
        await client.send(request(body))
        await until(lambda: len(engine.open_connections) > 0)
        await settled(lambda: process.rss_bytes() // MIB)
        grown = process.peak_rss_bytes() - before
        print(f"a body of {len(body) / MIB:.0f} MiB took {grown / MIB:.1f} MiB")
        assert grown < 2.5 * len(body)
        engine.reads = True
        await answers(process.url)
    await until(lambda: process.fds() <= fds)


async def _close(wire: Wire) -> None:
    wire.close()
    await bounded(wire.gone.wait())


async def test_engine_that_answers_before_it_reads(url: str, engine: RawEngine) -> None:
    """The client gets the answer although the engine never read the body; that connection is not used again."""
    refusal = plain(b'{"error": "too much"}', status="413 Content Too Large")

    async def refuse(wire: Wire) -> None:
        wire.stop_reading()
        await wire.send_apart([refusal])
        await refused.wait()

    refused = asyncio.Event()
    engine.on_connect = refuse
    body = json.dumps({"model": MODEL, "pad": "x" * (16 * MIB)}).encode()
    async with connected(url) as client:
        answer = await client.ask(request(body))
        assert (answer.status, answer.body) == (413, b'{"error": "too much"}')
        engine.on_connect = None
        answer = await client.ask(ASK)
        assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
    refused.set()
    assert [received.connection for received in engine.requests] == [len(engine.connections) - 1]
