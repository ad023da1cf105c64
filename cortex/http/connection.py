"""A client's connection: reads one request after the other, hands each to the gateway, and is written to by whoever
answers it."""

from __future__ import annotations

import asyncio
import socket
import struct
from time import monotonic
from typing import Final, Protocol, cast

from cortex.http.body_reader import IncomingBody
from cortex.http.connections import Connections
from cortex.http.decompress import unpack
from cortex.http.heads import BadHead, HeadReader, RequestHead, request_reader
from cortex.http.request import Request
from cortex.http.responses import CONTINUE, error_answer
from cortex.http.stopping import stopping
from shared.errors import InvalidRequest, ServiceError, is_anthropic_path

HEAD_TIMEOUT_SECS = 60.0
"""From a head's first byte to its end."""
BODY_TIMEOUT_SECS = 60.0
"""Between two pieces of a body."""
KEEP_ALIVE_SECS = 75.0
"""For an idle connection."""
LINGER_SECS = 5.0
"""For a client that is still sending when it has been refused: closing at once would destroy the answer on its way."""
CLOSING_SECS = 60.0
"""For a client to read what it has been sent."""
MAX_AHEAD_BYTES: Final = 65536
"""Of further requests that a client sends before it has its answer; then they are left where they are."""
LOOK_SECS: Final = 0.05
"""How often it is looked whether such a client is still there."""


_ESTABLISHED: Final = 1  # the first byte of struct tcp_info of tcp(7)
_LINE_ENDS: Final = b"\r\n"
_RESET: Final = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, for no time


class Handling(Protocol):
    """The work on one request. Ends with a call of `ClientConnection.finished`, unless it is abandoned."""

    def begin(self) -> None: ...

    def abandon(self) -> None:
        """The client has left: nothing is written to it any more."""

    def stop(self) -> None:
        """The time that requests have for their end is over: the client is told so, as far as it still can be."""

    def pause(self) -> None:
        """The client reads more slowly than it is written to."""

    def resume(self) -> None:
        """It has caught up."""


class Gateway(Protocol):
    """What the front hands requests to. `max_body_bytes` bounds a request's body, also unpacked."""

    max_body_bytes: int
    draining: bool

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        """Notes a request that was refused before it was whole; gives it an id."""

    def handle(self, client: ClientConnection, request: Request) -> Handling: ...


# What a connection does. Plain numbers: an Enum's members cost more to look up than the rest of a step.
_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_WORKING: Final = 3
_LINGERING: Final = 4  # refused, or sent too far ahead: what still comes is thrown away
_CLOSING: Final = 5


class ClientConnection:
    """One request at a time; what comes ahead of its turn waits. `deadline` is in monotonic seconds, 0 for none.

    An asyncio.Protocol in all but name: mypyc compiles no class with a base that is not compiled.
    """

    __slots__ = (
        "_ahead",
        "_body",
        "_connections",
        "_gateway",
        "_handling",
        "_held_back",
        "_reader",
        "_request",
        "_state",
        "deadline",
        "peer",
        "transport",
    )

    def __init__(self, gateway: Gateway, connections: Connections) -> None:
        """`connections` is the front's: this one is in it as long as it lives."""
        self._gateway = gateway
        self._connections = connections
        self._state = _IDLE
        self._reader: tuple[RequestHead, HeadReader] | None = None
        self._request: Request | None = None
        self._body: IncomingBody | None = None
        self._ahead = b""
        self._held_back = False
        self._handling: Handling | None = None
        self.deadline = 0.0
        self.peer = ""
        self.transport: asyncio.Transport  # set by connection_made

    @property
    def draining(self) -> bool:
        return self._gateway.draining

    @property
    def working(self) -> bool:
        """A request has begun and its answer is not finished."""
        return self._state in (_HEAD, _BODY, _WORKING)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.deadline = monotonic() + KEEP_ALIVE_SECS
        self._connections.opened(self)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state <= _HEAD:
            self._read_head(data)
        elif state == _BODY:
            self._read_body(data)
        elif state == _WORKING:
            self._keep(data)

    def eof_received(self) -> None:
        """A client that stops sending has left, as for every server of this kind. `abort`: what it has not read yet
        would keep the connection open."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        self._state = _CLOSING
        handling, self._handling = self._handling, None
        if handling is not None:
            handling.abandon()

    def pause_writing(self) -> None:
        if self._handling is not None:
            self._handling.pause()

    def resume_writing(self) -> None:
        if self._handling is not None:
            self._handling.resume()

    def finished(self) -> None:
        """The answer is written. The next request, or the end."""
        request = self._request
        assert request is not None
        self._request = self._handling = None
        if not request.keep_alive or self._gateway.draining:
            self.close()
            return
        if self._ahead:  # later, so that a row of them does not nest; what comes meanwhile goes behind them
            asyncio.get_running_loop().call_soon(self._go_on)
            return
        self._state = _IDLE
        self.deadline = monotonic() + KEEP_ALIVE_SECS

    def refuse(self, error: ServiceError, request_id: str, node: str | None = None) -> None:
        """Answers the request that is being worked on with an error. `node` is the neuron whose engine caused it."""
        request = self._request
        assert request is not None
        keep_alive = request.keep_alive = request.keep_alive and not self._gateway.draining
        anthropic = is_anthropic_path(request.path)
        answer = error_answer(error, request_id, anthropic=anthropic, keep_alive=keep_alive, node=node)
        self.transport.write(answer)
        self.finished()

    def stop(self) -> None:
        """The time that requests have for their end is over."""
        if self._handling is not None:
            self._handling.stop()
        elif self._state in (_HEAD, _BODY):
            self._reject(stopping())

    def expired(self) -> None:
        """The deadline has passed."""
        if self._state in (_HEAD, _BODY):
            self._reject(InvalidRequest("timed out waiting for the request", status=408))
        elif self._state == _IDLE:
            self.close()
        else:
            self.transport.abort()

    def cut(self) -> None:
        """Ends the connection by a reset: for an answer whose end is the connection's, a mere close would be a clean
        end."""
        self._state = _CLOSING
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def close(self) -> None:
        """Closes as soon as everything is sent."""
        self._state = _CLOSING
        self.deadline = monotonic() + CLOSING_SECS
        self.transport.close()

    def _linger(self) -> None:
        """Ends our side and waits for the client to end its own: closing while it sends would destroy what we sent."""
        self._state = _LINGERING
        self.deadline = monotonic() + LINGER_SECS
        self.transport.write_eof()

    def _read_head(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            if data[0] in _LINE_ENDS:  # RFC 9112, section 2.2: empty lines before a request are ignored
                data = data.lstrip(_LINE_ENDS)
                if not data:
                    return
            reader = request_reader()
        try:
            rest = reader[1].feed(data)
            if rest is None:
                if self._reader is None:
                    self._reader = reader
                    self._state = _HEAD
                    self.deadline = monotonic() + HEAD_TIMEOUT_SECS
                return
            self._reader = None
            self._request = request = Request(reader[0], peer=self.peer, received=monotonic())
            request.check_expectation()
        except BadHead as error:
            self._reject(InvalidRequest(str(error), status=error.status))
            return
        length = request.content_length
        if length == len(rest):  # as mostly: it came with its head, or there is none
            request.body = rest
            self._complete()
        elif length == 0:
            self._ahead = rest
            self._complete()
        else:
            self._begin_body(length, rest)

    def _begin_body(self, length: int | None, rest: bytes) -> None:
        request = self._request
        assert request is not None
        try:
            self._body = IncomingBody(length, self._gateway.max_body_bytes)
        except ServiceError as error:
            self._reject(error)
            return
        self._state = _BODY
        self.deadline = monotonic() + BODY_TIMEOUT_SECS
        if rest:
            self._read_body(rest)
        elif request.expects_continue:
            self.transport.write(CONTINUE)

    def _read_body(self, data: bytes) -> None:
        request, body = self._request, self._body
        assert request is not None
        assert body is not None
        try:
            rest = body.feed(data)
        except ServiceError as error:
            self._reject(error)
            return
        if rest is None:
            self.deadline = monotonic() + BODY_TIMEOUT_SECS
            return
        request.body = body.whole()
        self._body = None
        self._ahead = rest
        self._complete()

    def _complete(self) -> None:
        request = self._request
        assert request is not None
        encoding = request.content_encoding
        if encoding is not None:
            try:
                request.body = unpack(request.body, encoding, self._gateway.max_body_bytes)
            except ServiceError as error:
                self._reject(error)
                return
        self._state = _WORKING
        self.deadline = 0.0
        self._handling = handling = self._gateway.handle(self, request)
        handling.begin()

    def _keep(self, data: bytes) -> None:
        """A request that came before its turn."""
        self._ahead += data
        if len(self._ahead) > MAX_AHEAD_BYTES and not self._held_back:
            self._held_back = True
            self.transport.pause_reading()
            self._look_after()

    def _look_after(self) -> None:
        """While nothing is read, nobody tells that the client has left: the kernel is asked instead."""
        if not self._held_back or self._state == _CLOSING:
            return
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if info[0] == _ESTABLISHED:
            asyncio.get_running_loop().call_later(LOOK_SECS, self._look_after)
        else:
            self.transport.abort()

    def _go_on(self) -> None:
        if self._state != _WORKING:  # the connection was lost meanwhile
            return
        ahead, self._ahead = self._ahead, b""
        self._state = _IDLE
        self.data_received(ahead)
        if self._held_back and (self._state != _WORKING or len(self._ahead) <= MAX_AHEAD_BYTES):
            self._held_back = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def _reject(self, error: ServiceError) -> None:
        """Answers a request that cannot be read to its end, and ends the connection: where the next one would begin is
        not known."""
        request = self._request
        request_id = self._gateway.rejected(request, error)
        anthropic = request is not None and is_anthropic_path(request.path)
        self.transport.write(error_answer(error, request_id, anthropic=anthropic, keep_alive=False))
        self._linger()
        self._reader = self._request = self._body = None
