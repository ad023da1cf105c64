"""A client's connection: reads one request after the other and hands each to the dispatcher, whose handler writes the
answer to `transport`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol, cast

from cortex.http.body_reader import BodySpool, IncomingBody
from cortex.http.decompress import unpack
from cortex.http.errors import shutting_down
from cortex.http.handler import Handler
from cortex.http.heads import BadHead, HeadReader, RequestHead, request_reader
from cortex.http.request import Request
from cortex.http.responses import CONTINUE, error_answer
from cortex.http.streamed_body import StreamedBody
from shared.errors import InvalidRequest, ServiceError
from shared.serve import is_established, is_tls_over, is_unanswered, reset_on_close

HEAD_TIMEOUT_SECS = 60.0
"""Limit from the first byte of a head to its end."""
BODY_TIMEOUT_SECS = 60.0
"""Limit between two pieces of a body."""
KEEP_ALIVE_SECS = 75.0
"""How long an idle connection stays open."""
LINGER_SECS = 5.0
"""How long to read on from a client that is refused while it sends: an immediate close would discard the answer."""
UNREAD_SECS = 900.0
"""How long a client may take to read the rest of a complete answer."""
MAX_AHEAD_BYTES: Final = 65536
"""Bytes of pipelined requests to read ahead while an answer is incomplete; then reading pauses."""
LOOK_SECS: Final = 0.05
"""How often to ask the kernel whether a client is still connected while reading is paused."""

_LINE_ENDS: Final = b"\r\n"


class ConnectionSet(Protocol):
    def opened(self, connection: ClientConnection) -> None: ...
    def closed(self, connection: ClientConnection) -> None: ...


class Dispatcher(Protocol):
    """Picks the handler of each request. `max_body_bytes` bounds a request's body, before and after decompression.
    While `draining`, connections close after their current answer."""

    max_body_bytes: int
    draining: bool

    def rejected(self, request: Request | None, error: ServiceError) -> str:
        """Records a request that was refused before it was complete, None without a valid head. Returns its id."""

    def can_begin(self, request: Request, start: bytes) -> bool:
        """True if a large request can be handled when only the `start` of its body has arrived."""

    def spool(self, request: Request) -> BodySpool | None:
        """Where to store the body of such a request until it is complete, None to keep it in memory."""

    def handle(self, client: ClientConnection, request: Request) -> Handler: ...


# The states of a connection. Plain numbers: looking up an enum member costs more than the rest of a step.
_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_WORKING: Final = 3
_LINGERING: Final = 4  # refused: what still arrives is discarded
_CLOSING: Final = 5


class ClientConnection:
    """Handles one request at a time; pipelined requests wait. `deadline` is in monotonic seconds, 0 for none.

    An asyncio.Protocol in all but name: mypyc compiles no class with a base that is not compiled.
    """

    __slots__ = (
        "_ahead",
        "_body",
        "_connections",
        "_dispatcher",
        "_handler",
        "_held_back",
        "_reader",
        "_request",
        "_state",
        "_tunnel",
        "_unanswered",
        "deadline",
        "peer",
        "transport",
    )

    def __init__(self, dispatcher: Dispatcher, connections: ConnectionSet) -> None:
        """The connection is in `connections` from `connection_made` to `connection_lost`."""
        self._dispatcher = dispatcher
        self._connections = connections
        self._state = _IDLE
        self._reader: tuple[RequestHead, HeadReader] | None = None
        self._request: Request | None = None
        self._body: IncomingBody | None = None
        self._ahead = b""
        self._held_back = False
        self._handler: Handler | None = None
        self._unanswered = False
        self._tunnel: Callable[[bytes], None] | None = None
        self.deadline = 0.0
        self.peer = ""
        self.transport: asyncio.Transport  # set by connection_made

    @property
    def draining(self) -> bool:
        return self._dispatcher.draining

    @property
    def working(self) -> bool:
        """A request has begun and its answer is not complete."""
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
        """A client that stops sending counts as disconnected, as in most servers. `abort` also drops unread data."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        self._state = _CLOSING
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.abandon()
        if self._request is not None:
            self._request.discard()

    def pause_writing(self) -> None:
        if self._handler is not None:
            self._handler.pause()

    def resume_writing(self) -> None:
        if self._handler is not None:
            self._handler.resume()

    def finished(self) -> None:
        """The answer is written: start the next request, or close."""
        request = self._request
        assert request is not None
        self._request = self._handler = None
        if request.streamed is not None:
            request.discard()
        if self._body is not None:  # the answer came before the end of the request
            self._body = None
            self.hold_back(False)
            self._linger()
            return
        if not request.keep_alive or self._dispatcher.draining:
            self.close()
            return
        if self._ahead:  # deferred: many pipelined requests must not recurse
            asyncio.get_running_loop().call_soon(self._go_on)
            return
        self._state = _IDLE
        self.deadline = monotonic() + KEEP_ALIVE_SECS

    def refuse(self, error: ServiceError, request_id: str, node: str | None = None) -> None:
        """Answers the current request with an error. `node` is the neuron whose engine caused it."""
        request = self._request
        assert request is not None
        keep_alive = request.keep_alive = request.keep_alive and not self._dispatcher.draining
        self.transport.write(error_answer(error, request_id, request=request, keep_alive=keep_alive, node=node))
        self.finished()

    def stop(self) -> None:
        """The drain timeout is over."""
        if self._handler is not None:
            self._handler.stop()
        elif self._state in (_HEAD, _BODY):
            self._reject(shutting_down())

    def expired(self) -> None:
        """The deadline has passed."""
        if self._state in (_HEAD, _BODY):
            self._reject(InvalidRequest("timed out while reading the request", status=408))
        elif self._state == _IDLE or (self._state == _LINGERING and not self.transport.can_write_eof()):
            self.close()
        else:
            self.transport.abort()

    def tick(self, now: float, *, check_client: bool) -> None:
        """Called about once a second; `now` is monotonic seconds. `check_client`: aborts the connection if the client's
        kernel acknowledges nothing, now and at the previous check."""
        if 0 < self.deadline < now:
            self.expired()
        elif self._handler is not None:
            self._handler.tick(now)
        if not self.transport.can_write_eof() and is_tls_over(self.transport, closing=self._state == _CLOSING):
            self.transport.abort()
        if not check_client or self.transport.is_closing():
            return
        unanswered = is_unanswered(self.transport.get_extra_info("socket"))
        if unanswered and self._unanswered:
            self.transport.abort()
        self._unanswered = unanswered

    def cut(self) -> None:
        """Resets the connection: an ordinary close could look like a clean end of the answer."""
        self._state = _CLOSING
        reset_on_close(self.transport.get_extra_info("socket"))
        self.transport.abort()

    def close(self) -> None:
        """Closes once everything is sent."""
        self._state = _CLOSING
        self.deadline = monotonic() + UNREAD_SECS
        self.transport.close()

    def _linger(self) -> None:
        """Ends the sending side (TLS cannot) and waits for the client: a close while it sends discards our answer."""
        self._state = _LINGERING
        self.deadline = monotonic() + LINGER_SECS
        if self.transport.can_write_eof():
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
        if length == len(rest):  # the usual case: the body came with its head, or the request has none
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
            self._body = IncomingBody(length, self._dispatcher.max_body_bytes)
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
            if rest is None:
                self.deadline = monotonic() + BODY_TIMEOUT_SECS
                if request.content_encoding is None and body.shows_start():
                    request.body = body.take()
                    if self._dispatcher.can_begin(request, request.body):
                        request.streamed = StreamedBody(body, self.hold_back)
                        self._work(request)
                    else:
                        request.streamed = self._dispatcher.spool(request) if body.shown else None
                        body.put_back(request.body, request.streamed)
                return
        except ServiceError as error:
            self._reject(error)
            return
        request.body = body.whole()
        self._body = None
        self._ahead = rest
        self._complete()

    def _complete(self) -> None:
        request = self._request
        assert request is not None
        if (encoding := request.content_encoding) is not None:
            try:
                request.body = unpack(request.body, encoding, self._dispatcher.max_body_bytes)
            except ServiceError as error:
                self._reject(error)
                return
        self._work(request)

    def _work(self, request: Request) -> None:
        self._state = _WORKING
        self.deadline = 0.0
        self._handler = handler = self._dispatcher.handle(self, request)
        handler.begin()

    def _stream(self, data: bytes, streamed: StreamedBody) -> None:
        try:
            rest = streamed.feed(data)
        except ServiceError as error:
            handler, self._handler = self._handler, None
            if handler is not None:
                handler.abandon()
            self._reject(error)
            return
        self.deadline = monotonic() + BODY_TIMEOUT_SECS if rest is None else 0.0
        if rest is not None:
            self._body = None
            self._ahead = rest

    def begin_tunnel(self, write: Callable[[bytes], None]) -> None:
        """From now on the bytes of the client go to `write` instead of being read as requests."""
        self._tunnel = write
        ahead, self._ahead = self._ahead, b""
        if ahead:
            write(ahead)
        self.hold_back(False)

    def hold_back(self, full: bool) -> None:
        """Stops reading from the client while the engine takes no more."""
        if full == self._held_back or self.transport.is_closing():
            return
        self._held_back = full
        if self._body is not None:
            self.deadline = 0.0 if full else monotonic() + BODY_TIMEOUT_SECS
        if full:
            self.transport.pause_reading()
            self._look_after()
        else:
            self.transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        """Stores pipelined requests until the current answer is complete."""
        if self._body is not None and self._request is not None and isinstance(self._request.streamed, StreamedBody):
            self._stream(data, self._request.streamed)
        elif self._tunnel is not None:
            self._tunnel(data)
        else:
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD_BYTES:
                self.hold_back(True)

    def _look_after(self) -> None:
        """While reading is paused, asyncio does not notice a disconnect: polls the kernel instead."""
        if not self._held_back or self._state == _CLOSING:
            return
        if is_established(self.transport.get_extra_info("socket")):
            asyncio.get_running_loop().call_later(LOOK_SECS, self._look_after)
        else:
            self.transport.abort()

    def _go_on(self) -> None:
        if self._state != _WORKING:  # the connection was lost in the meantime
            return
        ahead, self._ahead = self._ahead, b""
        self._state = _IDLE
        self.data_received(ahead)
        if self._held_back and (self._state != _WORKING or len(self._ahead) <= MAX_AHEAD_BYTES):
            self.hold_back(False)

    def _reject(self, error: ServiceError) -> None:
        """Answers a request that cannot be read to its end, and closes: the start of the next one is unknown."""
        request = self._request
        request_id = self._dispatcher.rejected(request, error)
        self.transport.write(error_answer(error, request_id, request=request, keep_alive=False))
        self._linger()
        if request is not None:
            request.discard()
        self._reader = self._request = self._body = None
