"""TLS at the front door: what goes over it, what clients without it get, renewed certificates, and unfinished
handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shared.tls import LOOK_SECS
from tests.certificates import PairFiles, pair, trusting
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received
from tests.cortex.raw_http import RawClient, Wire, bounded, connected, request, settled, until

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')
MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> PairFiles:
    return pair(tmp_path)


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, files: PairFiles) -> RunningCortex:
    return await start_cortex([benjy], [{"id": MODEL}], gateway=files.gateway)


@pytest.fixture(params=[1], ids=["one-worker"])
async def process(
    request: pytest.FixtureRequest, tmp_path: Path, benjy: V1Neuron, engine: RawEngine, files: PairFiles
) -> AsyncIterator[CortexProcess]:
    workers = request.param
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], workers=workers, **files.gateway) as process:
        await until(lambda: "cortex listening on https://" in process.log())  # every worker serves
        yield process


@contextlib.asynccontextmanager
async def without_tls(url: str) -> AsyncIterator[RawClient]:
    """A TCP connection to the port of an https URL."""
    async with connected(url.replace("https://", "http://")) as client:
        yield client


async def serial_number(url: str) -> bytes:
    """Of the certificate that a new connection gets."""
    async with connected(url) as client:
        return bytes(client.transport.get_extra_info("ssl_object").getpeercert(binary_form=True))


async def test_requests_go_over_one_connection(process: CortexProcess) -> None:
    """HTTP/1.1 is negotiated, and the connection is kept."""
    async with connected(process.url) as client:
        tls = client.transport.get_extra_info("ssl_object")
        assert tls.version() in ("TLSv1.2", "TLSv1.3")
        for _ in range(3):
            assert json.loads((await client.ask(ASK)).body)["n"] == 1


async def test_http_without_tls_gets_an_answer(process: CortexProcess) -> None:
    """Also while the client sends a body."""
    async with without_tls(process.url) as client:
        answer = await client.ask(request(b"x" * 100_000))
        assert (answer.status, answer.get("connection")) == (400, "close")
        assert "use https:// instead of http://" in json.loads(answer.body)["error"]["message"]
        assert await client.rest() == b""
    await until(lambda: "this port speaks TLS" in process.log())


@pytest.mark.parametrize("data", [b"\x00\x01\x02", b"\x16\x03\x01\x00\x05hello", b"get / HTTP/1.1\r\n\r\n"])
async def test_what_is_neither_is_disconnected(cortex: RunningCortex, data: bytes) -> None:
    async with without_tls(cortex.url) as client:
        await client.send(data)
        assert b"HTTP/1.1" not in await client.rest()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
async def test_versions(cortex: RunningCortex, version: ssl.TLSVersion) -> None:
    """TLS 1.2 is the oldest, and ALPN offers HTTP/1.1 only."""
    context = trusting()
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    address = urlsplit(cortex.url)
    opening = asyncio.open_connection(address.hostname, address.port, ssl=context)
    if version is ssl.TLSVersion.TLSv1_1:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await bounded(opening)
        return
    _, writer = await bounded(opening)
    assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
    writer.close()
    await bounded(writer.wait_closed())


@pytest.mark.parametrize("process", [1, 2], indirect=True, ids=["one-worker", "two-workers"])
async def test_renewed_certificate_is_used(process: CortexProcess, files: PairFiles, tmp_path: Path) -> None:
    """Without a restart and in every worker. Connections that are open stay; files that cannot be used change
    nothing."""
    async with connected(process.url) as early:
        assert (await early.ask(ASK)).status == 200
        first = await serial_number(process.url)
        files.key.write_text("no key", encoding="ascii")
        await until(lambda: "has no PEM block PRIVATE KEY" in process.log())
        assert await serial_number(process.url) == first
        pair(tmp_path)
        workers = 2 if "worker 1 is process" in process.log() else 1
        await until(lambda: process.log().count("TLS files reloaded") == workers)
        for _ in range(4):  # the kernel chooses the worker
            assert await serial_number(process.url) != first
        assert (await early.ask(ASK)).status == 200


async def test_unfinished_handshakes_end(
    cortex: RunningCortex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that sends nothing and one that stops within its handshake."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("cortex.http.tls_listener.HANDSHAKE_SECS", 0.2)
    for start in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        async with without_tls(cortex.url) as client:
            await client.send(start)
            assert await client.rest() == b""
    assert caplog.text.count("not complete within 0.2 s") == 2


async def test_many_clients_at_once(cortex: RunningCortex, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart: more than there may be handshakes. None is dropped for one that connects a moment later."""
    monkeypatch.setattr("cortex.http.tls_listener.MAX_HANDSHAKES", 3)
    monkeypatch.setattr("cortex.http.tls_listener.GRACE_SECS", 60.0)
    async with contextlib.AsyncExitStack() as stack:
        clients = await asyncio.gather(*(stack.enter_async_context(connected(cortex.url)) for _ in range(20)))
        for client in clients:
            assert (await client.ask(ASK)).status == 200


async def test_handshakes_do_not_pile_up(cortex: RunningCortex, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many ends the oldest, and a client that finishes its handshake is served meanwhile."""
    monkeypatch.setattr("cortex.http.tls_listener.MAX_HANDSHAKES", 3)
    async with contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(without_tls(cortex.url)) for _ in range(4)]
        await bounded(slow[0].gone.wait())
        async with connected(cortex.url) as client:
            assert (await client.ask(ASK)).status == 200
        assert not slow[-1].gone.is_set()


async def test_refused_upload_gets_its_answer(cortex: RunningCortex) -> None:
    """The answer comes while the client still sends, which it may do to its end."""
    async with connected(cortex.url) as client:
        await client.send(request(b"", "Content-Length: 999999999", length=False))
        answer = await client.answer()
        assert (answer.status, answer.get("connection")) == (413, "close")
        await client.send(b"x" * MIB)


async def test_answer_that_is_read_late_is_complete(process: CortexProcess, engine: RawEngine) -> None:
    """The connection closes after the answer, most of which has not left yet."""
    body = b"x" * (24 * MIB)

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    engine.scripts.append(script)
    async with connected(process.url, receive_buffer=65536) as client:
        client.stop_reading()
        await client.send(request(b'{"model":"org/small"}', "Connection: close"))
        await settled(lambda: len(engine.requests))
        await asyncio.sleep(2.5 * LOOK_SECS)  # longer than idle connections have to answer the end of TLS
        client.read_on()
        assert (await client.answer()).body == body
        assert await client.rest() == b""


async def test_idle_client_that_does_not_answer_the_end(cortex: RunningCortex) -> None:
    """It does not read: nothing but the close of TCP ends its connection."""
    address = urlsplit(cortex.url)
    sock = socket.create_connection((address.hostname, address.port), timeout=10)
    with await asyncio.to_thread(trusting().wrap_socket, sock, server_hostname="127.0.0.1") as client:
        await asyncio.to_thread(client.sendall, request(b'{"model":"org/small","n":1}', "Connection: close"))
        await until(lambda: not _is_established(client))


def _is_established(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


async def test_tunnel(cortex: RunningCortex, engine: RawEngine) -> None:
    """A WebSocket's bytes pass in both directions."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        await wire.send(await bounded(wire.incoming.readexactly(5)))
        await bounded(wire.gone.wait())

    engine.script = script
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: x")
    async with connected(cortex.url) as client:
        await client.send(request(b"", *lines, method="GET", target=f"/v1/realtime?model={MODEL}"))
        assert (await client.head()).start == "HTTP/1.1 101 Switching Protocols"
        await client.send(b"hello")
        assert await bounded(client.incoming.readexactly(5)) == b"hello"
    await bounded(engine.connections[-1].gone.wait())
