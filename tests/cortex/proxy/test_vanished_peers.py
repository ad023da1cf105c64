"""Engines, hosts and clients that disappear without FIN or RST: no request hangs, no engine works for a client that
is gone, and a client that is alive is not cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import serve
from shared.serve import CLIENT_TIMES, SERVER_TIMES, UNANSWERED_CHECK_SECS, UNANSWERED_SECS, ProbeTimes
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain, stream_head
from tests.cortex.raw_http import Wire, bounded, connected, request, until
from tests.far_host import FarHost, far_host

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')
EVENT = b'data: {"a": 1}\n\n'
SCALED = ProbeTimes(1, 1, 1)
"""In place of the usual times."""


@pytest.fixture
def far() -> Iterator[FarHost]:
    with far_host() as host:
        yield host


@pytest.fixture
def neurons(benjy: V1Neuron, beast: V1Neuron) -> tuple[V1Neuron, V1Neuron]:
    return benjy, beast


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers count as vanished after about two seconds."""
    monkeypatch.setattr(serve, "SERVER_TIMES", SCALED)
    monkeypatch.setattr(serve, "CLIENT_TIMES", SCALED)
    monkeypatch.setattr(serve, "CLIENT_RETRY_SECS", 1)
    monkeypatch.setattr(serve, "UNANSWERED_SECS", 1.5)
    monkeypatch.setattr("cortex.http.server.UNANSWERED_CHECK_SECS", 0.3)
    monkeypatch.setattr("cortex.http.server.SWEEP_SECS", 0.1)
    monkeypatch.setattr("cortex.upstream.pool.CONNECT_TIMEOUT_SECS", 1.0)
    monkeypatch.setattr("cortex.proxy.relay.DOWN_SILENCE_SECS", 0.5)


def event_chunk(data: bytes = EVENT) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def begun_then_silent(wire: Wire, received: Received) -> None:
    await wire.send(stream_head() + event_chunk())
    await asyncio.Event().wait()


async def silent(wire: Wire, received: Received) -> None:
    await asyncio.Event().wait()


async def endless(wire: Wire, received: Received) -> None:
    await wire.send(stream_head())
    while True:
        await wire.send(event_chunk())
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def engine_of(neuron: V1Neuron, sock: socket.socket | None = None) -> AsyncIterator[RawEngine]:
    """An engine that serves the model, at first as a model that answers."""
    async with RawEngine().running(sock) as engine:
        neuron.models[MODEL] = "loaded"
        neuron.engine_url = engine.url
        yield engine


async def idle(cortex: RunningCortex) -> None:
    """Nothing counts as in flight any more."""
    await until(lambda: not any(cortex.parts.counts.all_in_flight().values()))


@contextlib.contextmanager
def own_socket(peer: tuple[str, int]) -> Iterator[socket.socket]:
    """A duplicate of one of this process's sockets that are connected to `peer`."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            sock = socket.socket(fileno=os.dup(int(entry.name)))
            with sock:
                if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM and sock.getpeername() == peer:
                    yield sock
                    return
    raise AssertionError(f"no connection to {peer}")


def times_of(sock: socket.socket) -> ProbeTimes:
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return ProbeTimes(*(sock.getsockopt(socket.IPPROTO_TCP, name) for name in names))


def can_limit_retries() -> bool:
    with socket.socket() as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, serve.TCP_RTO_MAX_MS, 1000)
        return True
    return False


async def test_sockets_have_probes(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Within 60 s towards engines and neurons, within 120 s towards clients, which may stop reading for longer."""
    assert SERVER_TIMES.total_secs < 60
    assert max(CLIENT_TIMES.total_secs, UNANSWERED_SECS + 2 * UNANSWERED_CHECK_SECS + SERVER_TIMES.idle_secs) < 120
    async with engine_of(benjy) as engine:
        cortex = await start_cortex([benjy], [{"id": MODEL}])
        async with connected(cortex.url) as client:
            await client.ask(ASK)
            neuron_port = int(benjy.url.rpartition(":")[2])
            for peer in ((engine.host, engine.port), ("127.0.0.1", neuron_port)):
                with own_socket(peer) as sock:
                    assert times_of(sock) == SERVER_TIMES
                    timeout_ms = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                    assert timeout_ms == SERVER_TIMES.total_secs * 1000
            with own_socket(client.sock.getsockname()) as sock:
                assert times_of(sock) == CLIENT_TIMES
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


@pytest.mark.usefixtures("_soon")
class TestEngine:
    """The engine's host is gone; its neuron, elsewhere, still answers."""

    async def test_vanishes_in_a_stream(self, start_cortex: StartCortex, benjy: V1Neuron, far: FarHost) -> None:
        """The client gets upstream_lost when the engine's host vanishes during a stream."""
        async with engine_of(benjy, far.listening()) as engine:
            engine.script = begun_then_silent
            cortex = await start_cortex([benjy], [{"id": MODEL}])
            async with connected(cortex.url) as client:
                await client.send(ASK)
                await client.head()
                await bounded(client.incoming.readuntil(EVENT))
                far.vanish()
                rest = await bounded(client.incoming.readuntil(b"0\r\n\r\n"))
            assert b"upstream_lost" in rest
            await idle(cortex)

    @pytest.mark.parametrize("kept", [False, True], ids=["new-connection", "kept-connection"])
    @pytest.mark.parametrize("sent", [False, True], ids=["before-the-request", "after-the-request"])
    async def test_vanishes_before_its_first_byte(
        self, start_cortex: StartCortex, neurons: tuple[V1Neuron, V1Neuron], far: FarHost, kept: bool, sent: bool
    ) -> None:
        """The request goes to the other replica, as after a reset, whether it was acknowledged or not."""
        benjy, beast = neurons
        async with engine_of(benjy, far.listening()) as engine:
            cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
            async with connected(cortex.url) as client:
                if kept:
                    assert (await client.ask(ASK)).status == 200
                engine.script = silent
                if not sent:
                    far.vanish()
                engine.asked.clear()
                await client.send(ASK)
                if sent:
                    await engine.next_request()
                    far.vanish()
                async with engine_of(beast):
                    answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
            await idle(cortex)


@pytest.mark.usefixtures("_soon")
class TestClient:
    """The client's host is gone."""

    @pytest.mark.parametrize("script", [silent, begun_then_silent, endless])
    async def test_vanishes(
        self,
        start_cortex: StartCortex,
        benjy: V1Neuron,
        far: FarHost,
        script: Callable[[Wire, Received], Coroutine[Any, Any, None]],
    ) -> None:
        """The engine is stopped when the client's host vanishes before the answer, in a silent stream, or while tokens
        flow."""
        async with engine_of(benjy) as engine:
            engine.script = script
            cortex = await start_cortex([benjy], [{"id": MODEL}], host=far.near_address)
            async with connected(cortex.url, sock=far.new_socket()) as client:
                await client.send(ASK)
                await engine.next_request()
                if script is not silent:
                    await client.head()
                    await bounded(client.incoming.readuntil(EVENT))
                far.vanish()
                await bounded(engine.connections[-1].gone.wait())
            await idle(cortex)

    async def test_vanishes_while_it_does_not_read(
        self, start_cortex: StartCortex, benjy: V1Neuron, far: FarHost
    ) -> None:
        """A client that vanishes with a full socket is noticed too."""
        async with engine_of(benjy) as engine:
            engine.script = flood
            cortex = await start_cortex([benjy], [{"id": MODEL}], host=far.near_address)
            async with connected(cortex.url, sock=far.new_socket(), receive_buffer=4096) as client:
                client.stop_reading()
                await client.send(ASK)
                await engine.next_request()
                await asyncio.sleep(0.5)
                far.vanish()
                await bounded(engine.connections[-1].gone.wait())
            await idle(cortex)

    async def test_vanishes_after_it_has_not_read_for_long(
        self, start_cortex: StartCortex, benjy: V1Neuron, far: FarHost
    ) -> None:
        """As soon as one that has just stopped reading, although the kernel doubles the time between its probes: after
        eight seconds the next one would be due at 12.6 s."""
        if not can_limit_retries():
            pytest.skip("needs TCP_RTO_MAX_MS of Linux 6.15")
        async with engine_of(benjy) as engine:
            engine.script = flood
            cortex = await start_cortex([benjy], [{"id": MODEL}], host=far.near_address)
            async with connected(cortex.url, sock=far.new_socket(), receive_buffer=4096) as client:
                client.stop_reading()
                await client.send(ASK)
                await engine.next_request()
                await asyncio.sleep(8)
                far.vanish()
                await bounded(engine.connections[-1].gone.wait(), secs=3.5)
            await idle(cortex)

    async def test_that_does_not_read_is_not_cut(
        self, start_cortex: StartCortex, benjy: V1Neuron, far: FarHost
    ) -> None:
        """Several times longer than it takes to notice a vanished client; then it reads everything."""
        async with engine_of(benjy) as engine:
            body = json.dumps({"text": "x" * 3_000_000}).encode()

            async def large(wire: Wire, received: Received) -> None:
                await wire.send(plain(body))

            engine.script = large
            cortex = await start_cortex([benjy], [{"id": MODEL}], host=far.near_address)
            async with connected(cortex.url, sock=far.new_socket(), receive_buffer=4096) as client:
                client.stop_reading()
                await client.send(ASK)
                await engine.next_request()
                await asyncio.sleep(6)
                client.read_on()
                answer = await client.answer()
            assert answer.body == body


async def flood(wire: Wire, received: Received) -> None:
    await wire.send(stream_head())
    while True:
        await wire.send(event_chunk(b"data: " + b"x" * 8000 + b"\n\n"))


@pytest.mark.usefixtures("_soon")
class TestNeuron:
    """A neuron counts as down; its engine's kernel still acknowledges, as on a frozen host."""

    async def test_down_ends_silent_streams(self, start_cortex: StartCortex, benjy: V1Neuron) -> None:
        """When a neuron counts as down, its silent streams end with an error that says so."""
        async with engine_of(benjy) as engine:
            engine.script = begun_then_silent
            cortex = await start_cortex([benjy], [{"id": MODEL}], poll={"timeout_secs": 0.1})
            async with connected(cortex.url) as client:
                await client.send(ASK)
                await client.head()
                await bounded(client.incoming.readuntil(EVENT))
                benjy.silent = True
                rest = await bounded(client.incoming.readuntil(b"0\r\n\r\n"))
            assert b"upstream_lost" in rest
            assert b"its neuron is down" in rest
            await idle(cortex)

    async def test_streams_continue_while_their_neuron_is_down(
        self, start_cortex: StartCortex, benjy: V1Neuron
    ) -> None:
        """A neuron may restart while its engines work."""
        async with engine_of(benjy) as engine:
            engine.script = endless
            cortex = await start_cortex([benjy], [{"id": MODEL}], poll={"timeout_secs": 0.1})
            async with connected(cortex.url) as client:
                await client.send(ASK)
                await client.head()
                benjy.silent = True
                await until(lambda: "benjy" in cortex.parts.fleet.down)
                for _ in range(40):  # two seconds
                    await bounded(client.incoming.readuntil(EVENT))

    async def test_down_before_the_first_byte(
        self, start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
    ) -> None:
        """The request goes to the other replica."""
        async with engine_of(benjy) as engine:
            engine.script = silent
            cortex = await start_cortex([benjy, beast], [{"id": MODEL}], poll={"timeout_secs": 0.1})
            async with connected(cortex.url) as client:
                await client.send(ASK)
                await engine.next_request()
                async with engine_of(beast):
                    benjy.silent = True
                    answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["n"]) == (200, 1)
