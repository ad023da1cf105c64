"""A scripted engine on a raw socket: records what it receives, answers exact bytes at exact moments."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.cortex.raw_http import Head, Truncated, Wire, framing_of, read_body, read_head

IDLE_SECS = 600.0
"""An engine's connection may lie idle as long as the test lasts."""


@dataclass(frozen=True)
class Received(Head):
    """A request as it came; `connection` is the engine's number of its connection, from 0."""

    body: bytes
    connection: int

    @property
    def method(self) -> str:
        return self.start.split(" ")[0]

    @property
    def target(self) -> str:
        return self.start.split(" ")[1]


Script = Callable[[Wire, Received], Awaitable[None]]


def plain(body: bytes, *lines: str, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    """A whole answer with a Content-Length."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stream_head(*lines: str, content_type: str = "text/event-stream") -> bytes:
    """The head of a chunked answer."""
    head = ["HTTP/1.1 200 OK", f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n"


def answering(*pieces: bytes) -> Script:
    """Sends the pieces, each read by cortex before the next one leaves."""

    async def script(wire: Wire, received: Received) -> None:
        if len(pieces) == 1:
            await wire.send(pieces[0])
        else:
            await wire.send_apart(pieces)

    return script


def closing(*pieces: bytes) -> Script:
    """Sends the pieces, then ends the connection."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send_apart(pieces)
        wire.close()

    return script


def resetting(*pieces: bytes) -> Script:
    """Sends the pieces, and when cortex has them resets the connection."""

    async def script(wire: Wire, received: Received) -> None:
        await wire.send_apart(pieces)
        wire.reset()

    return script


async def echo_number(wire: Wire, received: Received) -> None:
    """Answers with the request's `n`, so that a client can tell which answer it got."""
    number = json.loads(received.body).get("n")
    await wire.send(plain(json.dumps({"n": number, "usage": {"prompt_tokens": 3, "completion_tokens": 5}}).encode()))


class RawEngine:
    """Each request takes the next of `scripts`; without one, `script`. `GET /v1/models`, which cortex asks for the
    context length, gets `models_page` and is in `listed` instead of `requests`.

    `url` is what a neuron gives as the engine's endpoint. A request that is not strict HTTP, with a body of known
    length, fails the test. A connection is in `connections` once the engine reads from it, or does not (`reads`).
    """

    def __init__(self) -> None:
        self.script: Script = echo_number
        self.scripts: deque[Script] = deque()
        self.connections: list[Wire] = []
        self.requests: list[Received] = []
        self.listed: list[Received] = []
        self.models_page = b'{"object": "list", "data": []}'
        self.asked = asyncio.Event()  # set at each request
        self.reads = True  # False: connections are accepted and nothing is read from them
        self.on_connect: Callable[[Wire], Awaitable[None]] | None = None  # instead of reading requests
        self.url = ""
        self.host, self.port = "127.0.0.1", 0
        self._accepted: list[Wire] = []
        self._failures: list[Exception] = []

    async def next_request(self) -> Received:
        """The next request, or one that arrived since the last call."""
        await asyncio.wait_for(self.asked.wait(), 10)
        self.asked.clear()
        return self.requests[-1]

    @property
    def open_connections(self) -> list[Wire]:
        """Connections that neither side has ended."""
        return [wire for wire in self.connections if not wire.gone.is_set() and not wire.transport.is_closing()]

    def _accept(self, wire: Wire) -> Awaitable[None]:
        self._accepted.append(wire)
        return self._serve(wire)

    async def _serve(self, wire: Wire) -> None:
        number = len(self.connections)
        if not self.reads:
            wire.stop_reading()
        self.connections.append(wire)  # only now: a test may let it read on at once
        try:
            if self.on_connect is not None:
                await self.on_connect(wire)
                return
            while (received := await self._receive(wire, number)) is not None:
                if received.start.startswith("GET ") and received.target.endswith("/v1/models"):
                    self.listed.append(received)
                    await wire.send(plain(self.models_page))
                    continue
                self.requests.append(received)
                script = self.scripts.popleft() if self.scripts else self.script
                self.asked.set()
                await script(wire, received)
            wire.close()
        except (OSError, Truncated):
            pass  # cortex has left, which tests see in `gone`
        except Exception as error:  # noqa: BLE001 - raised again when the engine stops
            self._failures.append(error)
            wire.reset()

    async def _receive(self, wire: Wire, number: int) -> Received | None:
        head = await read_head(wire.incoming, secs=IDLE_SECS)
        if head is None:
            return None
        framing, length = framing_of(head)
        if framing == "close" and head.start.startswith("GET "):
            return Received(head.start, head.headers, b"", number)
        assert framing == "length", f"a request with framing {framing!r}: {head}"
        return Received(head.start, head.headers, await read_body(wire.incoming, framing, length), number)

    @contextlib.asynccontextmanager
    async def running(self, sock: socket.socket | None = None) -> AsyncIterator[RawEngine]:
        """Serves inside the body, on `sock` if one is given.

        Raises:
            Exception: cortex sent invalid HTTP, or a script failed.
        """
        loop = asyncio.get_running_loop()
        at: dict[str, Any] = {"host": self.host, "port": self.port} if sock is None else {"sock": sock}
        server = await loop.create_server(lambda: Wire(self._accept), **at)
        self.host, self.port = server.sockets[0].getsockname()
        self.url = f"http://{self.host}:{self.port}"
        try:
            yield self
        finally:
            server.close()
            for _ in range(3):  # turns of the loop from the acceptance of a connection to its place in the list
                await asyncio.sleep(0)
            tasks = [wire.serving for wire in self._accepted if wire.serving is not None]
            for wire in self._accepted:
                wire.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for failure in self._failures:
            raise failure
