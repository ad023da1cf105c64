"""Stopping: as real processes, real signals and real connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from shared.serve import ListenError, Site, bind, serving
from tests.far_host import far_host
from tests.processes import eventually

TOP = Path(__file__).parents[2]
LONG = 60.0  # longer than any test


@dataclass
class Service:
    """The process of tests/shared/service.py."""

    process: subprocess.Popen[str]
    port: int = 0

    def until(self, text: str) -> str:
        """Reads the output up to a line that contains `text`; returns that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line
        raise AssertionError(f"exited with {self.process.wait()} and never printed {text!r}")

    def request(self, path: str) -> socket.socket:
        """Opens a connection and sends a request; returns once the service handles it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.until("in flight")
        return connection

    def refuses(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def exit_code(self) -> int:
        return self.process.wait(20)


@contextlib.contextmanager
def running(drain_secs: float, lifeline: int | None = None) -> Iterator[Service]:
    arguments = [str(drain_secs)] + ([] if lifeline is None else [str(lifeline)])
    with subprocess.Popen(
        [sys.executable, "-m", "tests.shared.service", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TOP,
        pass_fds=[] if lifeline is None else [lifeline],
    ) as process:
        try:
            service = Service(process)
            service.port = int(service.until("port ").split()[1])
            yield service
        finally:
            if process.poll() is None:
                process.kill()


def received(connection: socket.socket) -> bytes:
    """Everything received until the connection closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError), connection:
        while chunk := connection.recv(65536):
            data += chunk
    return data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_requests_finish(number: signal.Signals) -> None:
    """The service refuses new connections, finishes the running answer, cleans up, and exits with 0."""
    with running(LONG) as service:
        connection = service.request("/held")
        service.process.send_signal(number)
        eventually(service.refuses, "the socket to close", within_secs=20)
        assert service.process.poll() is None
        service.let_go()
        assert received(connection).endswith(b"4\r\nlast\r\n0\r\n\r\n")
        service.until("cleaned up")
        assert service.exit_code() == 0


def test_second_signal_exits_at_once() -> None:
    """The process exits with 130 without waiting for requests; `on_forced_exit` still runs."""
    with running(LONG) as service:
        connection = service.request("/held")
        service.process.send_signal(signal.SIGTERM)
        service.until("SIGTERM: stopping")
        service.process.send_signal(signal.SIGINT)
        service.until("forced")
        assert service.exit_code() == 130
        assert b"last" not in received(connection)


@pytest.mark.parametrize("drain_secs", [0, 0.2])
def test_requests_beyond_the_deadline_are_cut(drain_secs: float) -> None:
    """An endless answer is cut, and not terminated as if complete. 0 seconds is a deadline too."""
    with running(drain_secs) as service:
        connection = service.request("/held")
        service.process.send_signal(signal.SIGTERM)
        assert service.exit_code() == 0
        answer = received(connection)
        assert b"first " in answer
        assert not answer.endswith(b"0\r\n\r\n")


def test_event_streams_end_when_the_service_stops() -> None:
    """An endless stream watches CLOSING, so stopping does not take the whole deadline."""
    with running(LONG) as service:
        connection = service.request("/events")
        service.process.send_signal(signal.SIGTERM)
        assert received(connection).endswith(b"closing\r\n0\r\n\r\n")
        assert service.exit_code() == 0


def test_idle_connection_does_not_delay_the_exit() -> None:
    """The service does not wait for a client that keeps an idle connection open."""
    with running(LONG) as service, socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"404" in connection.recv(4096)
        service.process.send_signal(signal.SIGTERM)
        assert service.exit_code() == 0


def test_end_of_the_lifeline_stops() -> None:
    """The kernel closes the pipe however the parent died."""
    reader, writer = os.pipe()
    try:
        with running(LONG, reader) as service:
            os.close(reader)
            connection = service.request("/held")
            os.close(writer)
            writer = -1
            service.until("parent process has died")
            service.let_go()
            assert received(connection).endswith(b"last\r\n0\r\n\r\n")
            assert service.exit_code() == 0
    finally:
        if writer >= 0:
            os.close(writer)


async def test_handlers_are_cancelled_when_the_client_disconnects() -> None:
    """Otherwise an engine would generate for a client that has left."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return web.Response()

    app = web.Application()
    app.router.add_get("/", handle)
    site = Site(app, bind("127.0.0.1", 0))
    async with serving([site], drain_timeout_secs=0), aiohttp.ClientSession() as session:
        asking = asyncio.ensure_future(session.get(f"http://127.0.0.1:{site.port}/"))
        await begun.wait()
        asking.cancel()
        await ended.wait()


async def test_handlers_are_cancelled_when_the_client_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client vanishes without FIN or RST in the middle of an event stream: nothing acknowledges what is written."""
    monkeypatch.setattr("shared.serve.UNANSWERED_SECS", 1)
    monkeypatch.setattr("shared.serve.UNANSWERED_CHECK_SECS", 0.3)
    ended = asyncio.Event()

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.1)
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/", events)
    with far_host() as host:
        site = Site(app, bind(host.near_address, 0))
        async with serving([site], drain_timeout_secs=0):
            with host.new_socket() as client:
                client.settimeout(10)
                await asyncio.to_thread(client.connect, (host.near_address, site.port))
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert await asyncio.to_thread(client.recv, 4096)
                host.vanish()
                await asyncio.wait_for(ended.wait(), 10)


def test_unusable_addresses_are_named() -> None:
    """The error names an address in use, or an address of another host."""
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:80"):
        bind("192.0.2.1", 80)


def test_a_port_can_be_reused_at_once() -> None:
    """A restart does not wait for old connections in TIME_WAIT."""
    first = bind("127.0.0.1", 0)
    first.listen()
    first.setblocking(True)
    port = first.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    served, _ = first.accept()
    served.close()
    first.close()
    client.close()
    bind("127.0.0.1", port).close()
