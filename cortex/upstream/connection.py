"""One connection to an engine: sends a request and passes the bytes of the answer on unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from cortex.http import headers as names
from cortex.http.framing import PREFIXES, BadFraming, BodyUntilClose, ChunkedBody, SizedBody
from cortex.http.heads import BadHead, HeadReader, ResponseHead, response_reader
from cortex.upstream.address import Address
from cortex.upstream.tail import MOST_CHUNKS, UsageTail

# Above this size two writes cost less than one copy.
_JOINED_BYTES: Final = 16384

Body = SizedBody | ChunkedBody | BodyUntilClose

MAX_INTERIM: Final = 32
"""Interim answers (100, 103) before the final one."""

CLOSED: Final = "the connection was closed"
SPEAKS_TLS: Final = "the answer is TLS: its address needs https:// instead of http://"
_TLS_RECORDS: Final = (b"\x15\x03", b"\x16\x03")  # an alert, a handshake


class Exchange(Protocol):
    """Receives the answer to one request from an EngineConnection. Exactly one of `lost` and `ended` is called last."""

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        """The head of the answer has arrived, with the first bytes of its body, if any."""

    def passed(self, data: bytes) -> None:
        """Further bytes of the body, still framed."""

    def ended(self) -> None:
        """The answer is complete."""

    def lost(self, reason: str, *, stale: bool) -> None:
        """The connection broke. `stale`: before any byte of an answer, on a connection that had served before."""


class ConnectionOwner(Protocol):
    """The pool that a connection belongs to."""

    def opened(self, connection: EngineConnection) -> None: ...

    def closed(self, connection: EngineConnection) -> None: ...

    def put(self, connection: EngineConnection) -> None:
        """The connection is idle and can be reused."""


class EngineConnection:
    """Belongs to its owner while idle, to one exchange while it works. Implements asyncio.Protocol without inheriting
    from it: mypyc cannot compile a class whose base is not compiled."""

    __slots__ = (
        "_between",
        "_body",
        "_chunks",
        "_exchange",
        "_interim",
        "_keep_alive",
        "_on_made",
        "_owner",
        "_paused",
        "_reader",
        "_served",
        "_straight",
        "_tail",
        "_to_head",
        "_upgrading",
        "_write",
        "address",
        "idle_since",
        "on_full",
        "partial",
        "straight_end",
        "transport",
    )

    def __init__(self, owner: ConnectionOwner, address: Address, on_made: Callable[[EngineConnection], None]) -> None:
        """`on_made` is called as soon as a request can be sent."""
        self.address = address
        self._on_made: Callable[[EngineConnection], None] | None = on_made
        self.idle_since = 0.0
        self.transport: asyncio.Transport  # set by connection_made
        self._owner = owner
        self._exchange: Exchange | None = None
        self._reader: tuple[ResponseHead, HeadReader] | None = None
        self._body: Body | None = None
        self._served = 0
        self._interim = 0
        self._keep_alive = False
        self._paused = False
        self._to_head = False
        self._upgrading = False
        self.partial = False  # the rest of the request's body is still to come
        self.on_full: Callable[[bool], None] | None = None  # the engine reads too slowly, or goes on
        self._straight = False
        self._between = False  # passing straight, and the next byte begins a chunk
        self.straight_end = b""  # how a whole chunk ends that bypasses the exchange
        self._write: Callable[[bytes], None]
        self._tail: UsageTail
        self._chunks: list[bytes]

    def expect_upgrade(self) -> None:
        """The next request asks for another protocol, whose bytes follow a 101; then the connection is used up."""
        self._upgrading = True

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Sends a request. Its answer goes to `exchange`."""
        self._to_head = head.startswith(b"HEAD ")
        self._exchange = exchange
        self._body = None
        self._straight = self._between = False
        self._reader = response_reader()
        self._interim = 0
        if len(body) > _JOINED_BYTES:
            self.transport.write(head)
            self.transport.write(body)
        else:
            self.transport.write(head + body)

    def abandon(self) -> None:
        """Drops the answer and closes the connection, which tells the engine to stop."""
        self._exchange = None
        self._straight = self._between = False
        self.transport.abort()

    def drop(self) -> None:
        """Drops the rest of an answer after its head. Keeps the connection if the answer is already complete."""
        body = self._body
        if body is not None and body.ended:
            self._release(body)
        else:
            self.abandon()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._owner.opened(self)
        on_made, self._on_made = self._on_made, None  # would keep the first request alive
        assert on_made is not None
        on_made(self)

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if (
            self._between
            and size < len(PREFIXES)
            and data.startswith(PREFIXES[size])
            and data.endswith(self.straight_end)
        ):
            # The hot path of every stream: one whole chunk per read. Inlined, because each additional call measurably
            # raises the cost of a stream.
            chunks = self._chunks
            chunks.append(data)
            if len(chunks) > MOST_CHUNKS:
                self._tail.join()
            self._write(data)
            return
        exchange = self._exchange
        if exchange is None:  # nothing may arrive on an idle connection
            self.transport.abort()
            return
        body = self._body
        if body is None:
            self._read_head(data)
            return
        try:
            data = body.feed(data)
        except BadFraming as error:
            self.lose(str(error))
            return
        if data:
            exchange.passed(data)
            if self._exchange is not exchange:  # it dropped the answer
                return
        if body.ended:
            self._end()
        elif self._straight:
            assert isinstance(body, ChunkedBody)
            self._between = body.between

    def pass_straight(self, write: Callable[[bytes], None], tail: UsageTail, straight_end: bytes) -> None:
        """From now on whole chunks of the current answer with this end, CRLF included, go to `write` and `tail` and
        bypass the exchange."""
        body = self._body
        assert isinstance(body, ChunkedBody)
        self._straight = True
        self._between = body.between
        self.straight_end = straight_end
        self._write = write
        self._tail = tail
        self._chunks = tail.chunks

    def eof_received(self) -> None:
        """The transport closes itself; `connection_lost` follows."""

    def pause_writing(self) -> None:
        """Usually there is nothing to pause: the request is written as a whole."""
        if self.on_full is not None:
            self.on_full(True)

    def resume_writing(self) -> None:
        if self.on_full is not None:
            self.on_full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.closed(self)
        if self._exchange is None:
            return
        if isinstance(self._body, BodyUntilClose) and exc is None:
            self._end()
        else:
            # Any other error says that the engine's host has vanished: a new connection would not reach it either.
            closed = exc is None or isinstance(exc, ConnectionError)
            self.lose(str(exc) if exc else CLOSED, closed=closed)

    def _read_head(self, data: bytes) -> None:
        while data:
            assert self._reader is not None
            try:
                head, reader = self._reader
                rest = reader.feed(data)
                if rest is None:
                    return
                if head.status >= 200 or (head.status == 101 and self._upgrading):
                    self._begin(head, rest)
                    return
                self._skip_interim(head)
            except BadHead as error:
                self.lose(SPEAKS_TLS if data[:2] in _TLS_RECORDS else f"invalid HTTP answer: {error}")
                return
            data = rest

    def _skip_interim(self, head: ResponseHead) -> None:
        """Skips 100 and 103; the final answer follows."""
        self._interim += 1
        if head.status == 101 or self._interim > MAX_INTERIM:
            raise BadHead("unexpected status 101" if head.status == 101 else f"more than {MAX_INTERIM} interim answers")
        self._reader = response_reader()

    def _begin(self, head: ResponseHead, rest: bytes) -> None:
        """Passes the head on together with the bytes that came with it."""
        exchange = self._exchange
        assert exchange is not None
        body = _framing(head, to_head=self._to_head)
        first, fault = b"", ""
        if body.ended:
            body.excess = rest
        elif rest:
            try:
                first = body.feed(rest)
            except BadFraming as error:
                fault = str(error)
        self._reader = None
        self._keep_alive = head.keep_alive
        self._body = body
        exchange.began(head, body, first)
        if self._exchange is not exchange:  # it dropped the answer; the connection may already serve another exchange
            return
        if fault:
            self.lose(fault)
        elif body.ended:
            self._end()

    def _end(self) -> None:
        exchange, body = self._exchange, self._body
        assert exchange is not None
        assert body is not None
        self._release(body)
        exchange.ended()

    def _release(self, body: Body) -> None:
        """The current answer is complete: returns the connection to its owner if it can be reused."""
        self._exchange = self._body = self.on_full = None
        self._straight = self._between = False
        self._served += 1
        transport = self.transport
        # If the answer came before the request was completely written, the rest would be read as the next request.
        if (
            self._keep_alive
            and not body.excess
            and not self.partial
            and not self._upgrading
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        ):
            self.resume()
            self._owner.put(self)
        else:
            transport.abort()

    def lose(self, reason: str, *, closed: bool = False) -> None:
        """Ends the current exchange as lost; `reason` goes into logs and error messages. `closed`: by the engine."""
        exchange = self._exchange
        assert exchange is not None
        untouched = self._body is None and self._reader is not None and not self._reader[1].begun and not self._interim
        self._exchange = None
        self._straight = self._between = False
        self.transport.abort()
        exchange.lost(reason, stale=closed and untouched and self._served > 0)

    @property
    def paused(self) -> bool:
        """The engine is not read from, because the client reads too slowly."""
        return self._paused

    def pause(self) -> None:
        """Stops reading, which makes the engine stop sending."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()


def _framing(head: ResponseHead, *, to_head: bool) -> Body:
    """The body framing, by RFC 9112, section 6.3. Raises BadHead if the end of the body is ambiguous."""
    encoding, length = head.named.get(names.TRANSFER_ENCODING), head.named.get(names.CONTENT_LENGTH)
    if head.status == 101:
        return BodyUntilClose()
    if encoding is not None and (length is not None or encoding.lower() != b"chunked"):
        raise BadHead(f"invalid Transfer-Encoding {encoding[:64]!r} with Content-Length {length!r}")
    if length is not None and not length.isdigit():
        raise BadHead(f"invalid Content-Length {length[:64]!r}")
    if to_head or head.status in (204, 304):
        return SizedBody(0)
    if encoding is not None:
        return ChunkedBody()
    return BodyUntilClose() if length is None else SizedBody(int(length))
