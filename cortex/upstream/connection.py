"""One connection to an engine: a request goes out, an answer's bytes come in and pass on as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, cast

from cortex.http import headers as names
from cortex.http.framing import PREFIXES, BadFraming, BodyUntilClose, ChunkedBody, SizedBody
from cortex.http.heads import BadHead, HeadReader, ResponseHead, response_reader
from cortex.upstream.tail import MOST_CHUNKS, UsageTail

if TYPE_CHECKING:
    from cortex.upstream.pool import Address, EnginePool

# Above it two writes cost less than one copy.
_JOINED_BYTES: Final = 16384

Body = SizedBody | ChunkedBody | BodyUntilClose

MAX_INTERIM: Final = 32
"""Interim answers (100, 103) before one that counts."""


class Exchange(Protocol):
    """What an engine connection tells about the one request it works on. Exactly one of `lost` and `ended` ends it."""

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        """The answer's head is there, and with it the first bytes of its body (none, perhaps)."""

    def passed(self, data: bytes) -> None:
        """Bytes of the answer's body, in their framing."""

    def ended(self) -> None:
        """The answer is whole."""

    def lost(self, reason: str, *, stale: bool) -> None:
        """The engine is lost. `stale`: before any byte of an answer, on a connection that had served before."""


class EngineConnection:
    """Belongs to the pool while idle, to one exchange while it works. An asyncio.Protocol in all but name: mypyc
    compiles no class with a base that is not compiled."""

    __slots__ = (
        "_between",
        "_body",
        "_chunks",
        "_exchange",
        "_interim",
        "_keep_alive",
        "_on_made",
        "_paused",
        "_pool",
        "_reader",
        "_served",
        "_straight",
        "_tail",
        "_to_head",
        "_write",
        "address",
        "idle_since",
        "transport",
    )

    def __init__(self, pool: EnginePool, address: Address, on_made: Callable[[EngineConnection], None]) -> None:
        """`on_made` is called as soon as something can be sent."""
        self.address = address
        self._on_made: Callable[[EngineConnection], None] | None = on_made
        self.idle_since = 0.0
        self.transport: asyncio.Transport  # set by connection_made
        self._pool = pool
        self._exchange: Exchange | None = None
        self._reader: tuple[ResponseHead, HeadReader] | None = None
        self._body: Body | None = None
        self._served = 0
        self._interim = 0
        self._keep_alive = False
        self._paused = False
        self._to_head = False
        self._straight = False
        self._between = False  # and the next byte begins a chunk
        self._write: Callable[[bytes], None]
        self._tail: UsageTail
        self._chunks: list[bytes]

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Writes a request. Its answer goes to `exchange`."""
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
        """Nobody wants the answer any more: closing is what tells the engine to stop."""
        self._exchange = None
        self._straight = self._between = False
        self.transport.abort()

    def drop(self) -> None:
        """Nobody wants more of the answer than its head. The connection is kept where the answer is whole already."""
        body = self._body
        if body is not None and body.ended:
            self._release(body)
        else:
            self.abandon()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pool.opened(self)
        on_made, self._on_made = self._on_made, None  # it leads to the first request, which is not to be kept
        assert on_made is not None
        on_made(self)

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if self._between and size < len(PREFIXES) and data.startswith(PREFIXES[size]) and data.endswith(b"\r\n"):
            # The usual case by far, one whole chunk in a piece, in as few steps as possible: each call more makes
            # itself felt in what a stream costs.
            chunks = self._chunks
            chunks.append(data)
            if len(chunks) > MOST_CHUNKS:
                self._tail.join()
            self._write(data)
            return
        exchange = self._exchange
        if exchange is None:  # an idle connection has nothing to say
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
        if body.ended:
            self._end()
        elif self._straight:
            assert isinstance(body, ChunkedBody)
            self._between = body.between

    def pass_straight(self, write: Callable[[bytes], None], tail: UsageTail) -> None:
        """From now on whole chunks of the present answer go to `write` and `tail`, and not by the exchange."""
        body = self._body
        assert isinstance(body, ChunkedBody)
        self._straight = True
        self._between = body.between
        self._write = write
        self._tail = tail
        self._chunks = tail.chunks

    def eof_received(self) -> None:
        """The transport closes itself, and `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.closed(self)
        if self._exchange is None:
            return
        if isinstance(self._body, BodyUntilClose) and exc is None:
            self._end()
        else:
            self.lose(str(exc) if exc else "the connection was closed")

    def _read_head(self, data: bytes) -> None:
        while data:
            assert self._reader is not None
            try:
                head, reader = self._reader
                rest = reader.feed(data)
                if rest is None:
                    return
                if head.status >= 200:
                    self._begin(head, rest)
                    return
                self._skip_interim(head)
            except BadHead as error:
                self.lose(f"its answer is not HTTP: {error}")
                return
            data = rest

    def _skip_interim(self, head: ResponseHead) -> None:
        """100 and 103 say that the answer is still to come."""
        self._interim += 1
        if head.status == 101 or self._interim > MAX_INTERIM:
            raise BadHead(f"status {head.status}")
        self._reader = response_reader()

    def _begin(self, head: ResponseHead, rest: bytes) -> None:
        """The head and what came with it pass on in one piece."""
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
        if self._exchange is not exchange:  # it wants no more, and the connection may work for another one by now
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
        """The present answer is over: back to the pool, if the next one can be told from it."""
        self._exchange = self._body = None
        self._straight = self._between = False
        self._served += 1
        transport = self.transport
        # An answer may come before the request is wholly written: the rest of that would read as the next one.
        if (
            self._keep_alive
            and not body.excess
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        ):
            self.resume()
            self._pool.put(self)
        else:
            transport.abort()

    def lose(self, reason: str) -> None:
        """Ends the exchange that is under way; `reason` is for whoever reads of it."""
        exchange = self._exchange
        assert exchange is not None
        untouched = self._body is None and self._reader is not None and not self._reader[1].begun and not self._interim
        self._exchange = None
        self._straight = self._between = False
        self.transport.abort()
        exchange.lost(reason, stale=untouched and self._served > 0)

    def pause(self) -> None:
        """Stops the reading: the engine's sending stops with it."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()


def _framing(head: ResponseHead, *, to_head: bool) -> Body:
    """RFC 9112, section 6.3; BadHead where the end of the body cannot be told safely."""
    encoding, length = head.named.get(names.TRANSFER_ENCODING), head.named.get(names.CONTENT_LENGTH)
    if encoding is not None and (length is not None or encoding.lower() != b"chunked"):
        raise BadHead(f"transfer encoding {encoding[:64]!r}, length {length!r}")
    if length is not None and not length.isdigit():
        raise BadHead(f"content length {length[:64]!r}")
    if to_head or head.status in (204, 304):
        return SizedBody(0)
    if encoding is not None:
        return ChunkedBody()
    return BodyUntilClose() if length is None else SizedBody(int(length))
