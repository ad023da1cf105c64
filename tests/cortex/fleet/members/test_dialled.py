"""A neuron's connections and the broker that has them, over real sockets: who is accepted, what can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cortex.config.settings import CortexConfig
from cortex.fleet.engine_url import reachable_url
from cortex.fleet.members.dialled import broker as broker_module
from cortex.fleet.members.dialled.broker import MAX_IDLE, Broker
from cortex.fleet.members.dialled.broker_process import DialBroker
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.neuron_http import fetch
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.upstream.address import Address, parse_url
from cortex.upstream.pool import EnginePool, NoConnection
from neuron.api import dialling
from neuron.api.dialling import IDLE_CONNECTIONS, Dialler, Targets
from shared.errors import Conflict, InvalidRequest
from shared.protocol import DialReply, NeuronHealth, Registration, RegistrationReply
from shared.serve import bind
from shared.tasks import running
from shared.tls import TlsFiles, client_context, server_context
from tests.certificates import authority_file, pair
from tests.cortex.raw_http import settled, until

NAME, KEY = "Far.Host", "key-of-the-neuron"
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Broken:
    """A broker with its sockets. `told`: the names of connected neurons, as last told."""

    port: int
    pool: EnginePool
    address: str
    broker: Broker
    told: list[list[str]] = field(default_factory=list)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of cortex that has not asked for anything."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address)  # uvloop itself does not know Linux's abstract namespace
        return await asyncio.open_unix_connection(sock=sock, limit=1 << 10)

    async def ask(self, port: int) -> bytes:
        answer = await fetch(self.pool, Address(NAME, port, dialled=True), HEAD, again=False)
        return answer.body

    @contextlib.asynccontextmanager
    async def dialled(
        self, *engines: int, own: int = 1, url: str = "http://127.0.0.1", tls: bool = False, ca: Path | None = None
    ) -> AsyncIterator[Dialler]:
        """A neuron with engines on these ports that keeps connections here."""

        def ports() -> Collection[int]:
            return engines

        def context() -> ssl.SSLContext:
            return client_context(TlsFiles(ca=ca))

        dialler = Dialler(f"{url}:1", NAME, Targets("127.0.0.1", own, ports), context)
        async with dialler.running():
            reply = DialReply(port=self.port, tls=tls, key=KEY)
            dialler.use(RegistrationReply(name=NAME, expires_secs=10, dial=reply))
            yield dialler

    @contextlib.asynccontextmanager
    async def greeted(
        self, *, name: str = NAME, key: str = KEY, path: str = "/fleet/dial"
    ) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
        """What a neuron with these gets: the status, and what follows the head."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = (f"GET {path} HTTP/1.1", "Upgrade: neuron-dial", f"Authorization: Bearer {key}", f"Neuron-Name: {name}")
        writer.write("\r\n".join((*lines, "", "")).encode())
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        try:
            yield status, reader
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def brokered(tls: ssl.SSLContext | None = None) -> AsyncIterator[Broken]:
    """A broker that knows one neuron."""
    told: list[list[str]] = []
    broker = Broker(told.append)
    broker.use({NAME: KEY})
    neurons, requests = bind("127.0.0.1", 0), socket.socket(socket.AF_UNIX)
    requests.bind("")
    for listening in (neurons, requests):
        listening.listen()
        listening.setblocking(False)
    address = requests.getsockname().decode("ascii")
    loops = {
        "neurons": lambda: broker.accept_neurons(neurons, lambda: tls),
        "requests": lambda: broker.accept_requests(requests),
        "pings": broker.ping_loop,
    }
    with neurons, requests, contextlib.closing(EnginePool(broker=address)) as pool:
        async with running(loops):
            yield Broken(neurons.getsockname()[1], pool, address, broker, told)
        await broker.close()


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[int]:
    """The port of a server that answers one request a connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_only_neuron_and_its_engines_can_be_reached() -> None:
    """Whatever else listens on that host is refused, and an engine that has gone is called so."""
    async with engine() as own, engine() as ours, engine() as foreign, brokered() as cortex:
        with bind("127.0.0.1", 0) as unused:
            gone = unused.getsockname()[1]
        async with cortex.dialled(ours, gone, own=own):
            for port in (0, own, ours):
                assert await cortex.ask(port) == b"ok"
            with pytest.raises(NoConnection, match="not one of neuron's engines"):
                await cortex.ask(foreign)
            with pytest.raises(NoConnection, match="nothing answers on port"):
                await cortex.ask(gone)
            assert cortex.told == [[NAME]]
        await until(lambda: cortex.told == [[NAME], []])


async def test_more_requests_at_once_than_connections_wait_for_new_ones() -> None:
    async with engine() as own, brokered() as cortex, cortex.dialled(own=own):
        count = 5 * IDLE_CONNECTIONS
        assert await asyncio.gather(*(cortex.ask(0) for _ in range(count))) == [b"ok"] * count


async def test_who_is_refused() -> None:
    """Each is told what to do. Those that are accepted are limited in number."""
    async with brokered() as cortex:
        for given, status, reason in (
            ({"key": "another"}, 401, "the last registration"),
            ({"name": "Other.Host"}, 404, "is registered"),
            ({"path": "/v1/models"}, 400, "not for clients"),
        ):
            async with cortex.greeted(**given) as (found, reader):
                assert found == status
                assert reason in json.loads(await reader.read())["error"]["message"]
        async with contextlib.AsyncExitStack() as stack:
            statuses = [(await stack.enter_async_context(cortex.greeted()))[0] for _ in range(MAX_IDLE + 1)]
        assert statuses == [101] * MAX_IDLE + [409]


async def test_connections_that_are_dead_or_of_an_old_registration_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead is one whose neuron does not answer pings."""
    monkeypatch.setattr(broker_module, "PING_SECS", 0.05)
    async with engine() as own, brokered() as cortex:
        async with cortex.greeted() as (_, reader):
            assert await reader.read() == b"\n"
        async with cortex.dialled(own=own):
            await until(lambda: cortex.told[-1] == [NAME])
            cortex.broker.use({})
            await until(lambda: cortex.told[-1] == [])
            with pytest.raises(NoConnection, match="no free connection"):
                await cortex.ask(0)
            cortex.broker.use({NAME: KEY})
            await until(lambda: cortex.told[-1] == [NAME])
            assert await cortex.ask(0) == b"ok"


async def test_a_request_that_leaves_while_its_connection_opens_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The neuron's connection ends too, and nothing is written to one that has ended."""
    async with brokered() as cortex, cortex.greeted() as (_, neuron):
        reader, writer = await cortex.open()
        writer.write(f"{NAME} 0\n".encode())
        assert await neuron.readline() == b"0\n"
        writer.close()
        assert await neuron.read() == b""
        assert await reader.read() == b""
        await until(lambda: cortex.told == [[NAME], []])
    assert "Traceback" not in caplog.text


async def test_no_free_connection_does_not_mean_that_the_engine_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is called refused is not asked again until its neuron has been polled."""
    monkeypatch.setattr(broker_module, "WAIT_SECS", 0.01)
    async with brokered() as cortex:
        with pytest.raises(NoConnection, match="no free connection") as unknown:
            await cortex.ask(0)
        async with cortex.greeted() as (_, neuron):
            first = asyncio.create_task(cortex.ask(0))
            assert await neuron.readline() == b"0\n"
            with pytest.raises(NoConnection, match="no free connection") as busy:
                await cortex.ask(0)
            first.cancel()
    assert (unknown.value.kind, busy.value.kind) == ("refused", "timeout")


async def test_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The certificate is checked, and a neuron that registers over https sends nothing without TLS."""
    files = pair(tmp_path)
    context = server_context(TlsFiles(files.cert, files.key))
    async with engine() as own, brokered(context) as cortex:
        async with cortex.dialled(own=own, url="https://localhost", tls=True, ca=authority_file(tmp_path)):
            assert await cortex.ask(0) == b"ok"
        async with cortex.dialled(own=own, url="https://localhost", tls=True):
            await until(lambda: "certificate verify failed" in caplog.text)
        async with cortex.dialled(own=own, url="https://localhost"):
            await until(lambda: "does not speak TLS" in caplog.text)


class Flood:
    """Sends without end. `pieces`: how many of 64 KiB so far. `left` is set when the receiver has gone."""

    def __init__(self) -> None:
        self.pieces = 0
        self.left = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
                self.pieces += 1
        except ConnectionError:
            self.left.set()

    @contextlib.asynccontextmanager
    async def received(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """What it sends, at cortex's end."""
        server = await asyncio.start_server(self, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, brokered() as cortex, cortex.dialled(own=port):
            reader, writer = await cortex.open()
            writer.write(f"{NAME} 0\n".encode())
            assert await reader.readuntil(b"\n") == b"ok\n"
            try:
                yield reader, writer
            finally:
                writer.transport.abort()


async def test_a_receiver_that_does_not_read_stops_the_sender() -> None:
    """All that is in between are buffers of limited size. When it leaves, the sender notices."""
    flood = Flood()
    async with flood.received() as (reader, writer):
        stopped_at = await settled(lambda: flood.pieces)
        assert stopped_at < (32 << 20) >> 16
        while flood.pieces == stopped_at:
            assert await reader.read(1 << 16)
        writer.transport.abort()
        await flood.left.wait()


async def test_streams_of_a_cortex_that_has_vanished_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an engine would work for it until TCP gives up, a quarter of an hour later."""
    monkeypatch.setattr(dialling, "UNANSWERED_CHECK_SECS", 0.01)
    monkeypatch.setattr(dialling, "is_unanswered", lambda _: True)
    flood = Flood()
    async with flood.received() as (reader, _):
        await flood.left.wait()
        while await reader.read(1 << 16):
            pass


def test_urls_of_a_neuron_that_dials() -> None:
    """Its name keeps its capitals, and whichever host an engine's URL has is on that side."""
    assert parse_url("dial://Far.Host") == (Address("Far.Host", 0, dialled=True), b"")
    for host in ("127.0.0.1", "[::1]", "0.0.0.0", "10.0.0.7"):
        url = reachable_url(f"http://{host}:28101/prefix/", "dial://Far.Host")
        assert parse_url(url) == (Address("Far.Host", 28101, dialled=True), b"/prefix")
    assert Address("Far.Host", 28101, dialled=True).authority == b"localhost:28101"
    for wrong in ("dial://", "dial://a:b"):
        with pytest.raises(ValueError, match="dials"):
            parse_url(wrong)
    with pytest.raises(ValueError, match="needs http:// and a port"):
        reachable_url("https://127.0.0.1:28101", "dial://Far.Host")


def announcement(process: str) -> Registration:
    return Registration(name=NAME, endpoint=f"dial://{NAME}", instance_id=process, interval_secs=10)


async def test_one_process_has_the_name() -> None:
    """Another one gets it, with a key of its own, when the first is no longer connected: it may have been restarted."""
    fleet = Fleet([], unhealthy_after=3)
    listening = bind("127.0.0.1", 0)
    with contextlib.closing(EnginePool()) as pool, contextlib.closing(DialBroker(CortexConfig(), listening)) as broker:
        membership = Membership(pool, fleet)
        registrations = Registrations(membership, fleet, StateFile(), broker)
        first = registrations.register(announcement("a")).dial
        assert first is not None
        assert first.port == listening.getsockname()[1]
        assert registrations.register(announcement("a")).dial == first
        broker.connected = frozenset([NAME])
        fleet.record_poll(NAME, started=0, health=NeuronHealth(uptime_secs=1), models=None, discovery=None)
        with pytest.raises(Conflict):
            registrations.register(announcement("b"))
        broker.connected = frozenset()
        second = registrations.register(announcement("b")).dial
        assert second is not None
        assert second.key != first.key
        without = Registrations(membership, fleet, StateFile())
        with pytest.raises(InvalidRequest, match="dial_listen"):
            without.register(announcement("a"))
        await membership.close()
