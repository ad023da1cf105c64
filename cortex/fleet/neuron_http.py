"""HTTP to neurons over kept-alive connections: a request with its whole answer, or a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from cortex.fleet.sse_reader import EventReader
from cortex.http import headers as names
from cortex.http.decompress import unpack
from cortex.http.framing import ChunkedBody
from cortex.http.heads import ResponseHead
from cortex.upstream.address import Address
from cortex.upstream.connection import Body, EngineConnection
from cortex.upstream.pool import EnginePool
from shared.errors import InvalidRequest, RequestTooLarge

MAX_ANSWER_BYTES = 16 << 20
"""Limit for one answer of a neuron. An entry of `/models` takes about half a KiB."""

OnEvent = Callable[[str, Any], None]


class NeuronAnswer(NamedTuple):
    """A complete answer, its body without the framing and uncompressed."""

    status: int
    body: bytes


class AnswerTooLarge(Exception):
    """The answer exceeds the limit of `max_bytes`; `status` is its HTTP status."""

    def __init__(self, status: int, max_bytes: int) -> None:
        super().__init__(f"the answer is larger than {max_bytes / (1 << 20):g} MiB")
        self.status = status


class NoEventStream(Exception):
    """The response is not an event stream; `status` is its HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__("no event stream")
        self.status = status


class _Stale(Exception):
    """The neuron closed a kept connection just as it was reused."""


class _Exchange:
    """Implements the protocol `Exchange` of `cortex.upstream.connection`; subclasses handle the body. `outcome` is set
    when the exchange ends."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self._request = head, body
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.encoding: bytes | None = None
        self._connection: EngineConnection | None = None
        self._chunks: ChunkedBody | None = None

    async def begin(self, pool: EnginePool, address: Address, kept: EngineConnection | None) -> None:
        """Sends the request, on a new connection when `kept` is None. Raises as `EnginePool.connect`."""
        if kept is None:
            await pool.connect(address, self._send)
        else:
            self._send(kept)

    def leave(self) -> None:
        """The caller no longer waits: closes the connection if it is busy."""
        if not self.outcome.done():
            self.outcome.cancel()
        elif not self.outcome.cancelled():
            self.outcome.exception()  # retrieved, so that asyncio does not report it
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        self.status = head.status
        self.encoding = head.named.get(names.CONTENT_ENCODING)
        if isinstance(body, ChunkedBody):
            first = body.start_unpacking(first)
            self._chunks = body
        if first:
            self._take(first)

    def passed(self, data: bytes) -> None:
        self._take(data if self._chunks is None else self._chunks.take())

    def ended(self) -> None:
        self._connection = None
        if not self.outcome.done():
            self.outcome.set_result(None)

    def lost(self, reason: str, *, stale: bool) -> None:
        self._connection = None
        self._fail(_Stale() if stale else ConnectionError(reason))

    def _send(self, connection: EngineConnection) -> None:
        if self.outcome.done():
            connection.abandon()
            return
        self._connection = connection
        connection.send(self, *self._request)

    def _fail(self, error: Exception) -> None:
        """The waiting caller closes the connection, which must not be closed inside its own callbacks."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def _take(self, data: bytes) -> None:
        raise NotImplementedError


class _Whole(_Exchange):
    def __init__(self, head: bytes, body: bytes, max_bytes: int) -> None:
        super().__init__(head, body)
        self.pieces: list[bytes] = []
        self._size = 0
        self._max_bytes = max_bytes

    def _take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._max_bytes:
            self._fail(AnswerTooLarge(self.status, self._max_bytes))
        else:
            self.pieces.append(data)

    def content(self) -> bytes:
        """The body. cortex asks for it uncompressed, which some servers and proxies ignore."""
        body = b"".join(self.pieces)
        if not self.encoding or self.encoding.strip().lower() == b"identity":
            return body
        try:
            return unpack(body, self.encoding, self._max_bytes)
        except RequestTooLarge as error:
            raise AnswerTooLarge(self.status, self._max_bytes) from error
        except InvalidRequest as error:
            raise ConnectionError(f"the answer's {error.message}") from error


class _Stream(_Exchange):
    def __init__(self, head: bytes, on_data: Callable[[bytes], None]) -> None:
        super().__init__(head, b"")
        self._on_data = on_data
        self.heard = False

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        kind = head.named.get(names.CONTENT_TYPE, b"").partition(b";")[0].strip().lower()
        if head.status != 200 or kind != b"text/event-stream":
            self._fail(NoEventStream(head.status))
        super().began(head, body, first)

    def _take(self, data: bytes) -> None:
        if self.outcome.done():
            return
        self.heard = True
        try:
            self._on_data(data)
        except Exception as error:  # noqa: BLE001 - raised in the waiting caller
            self._fail(error)


async def fetch(
    pool: EnginePool,
    address: Address,
    head: bytes,
    body: bytes = b"",
    *,
    again: bool,
    max_bytes: int | None = None,
) -> NeuronAnswer:
    """The answer to one request. `again` True: it may be sent twice, so a kept connection can be used.

    Raises:
        OSError: no answer, or one that is incomplete or cannot be decompressed. asyncio.TimeoutError: no connection
            within the pool's time.
        AnswerTooLarge: the answer's body is larger than `max_bytes`, by default MAX_ANSWER_BYTES.
    """
    kept = pool.take(address) if again else None
    while True:
        exchange = _Whole(head, body, MAX_ANSWER_BYTES if max_bytes is None else max_bytes)
        try:
            await exchange.begin(pool, address, kept)
            await exchange.outcome
            return NeuronAnswer(exchange.status, exchange.content())
        except _Stale:
            kept = None
        except ConnectionError as error:
            if address.tls and not exchange.status:
                raise ConnectionError(f"{error}: does the neuron ask for a certificate ([neuron_tls] cert)?") from error
            raise
        finally:
            exchange.leave()


async def follow(pool: EnginePool, address: Address, head: bytes, on_event: OnEvent, *, silence_secs: float) -> None:
    """Calls `on_event` with the name and the JSON data of each event until the stream ends.

    Raises:
        NoEventStream: the response is not an event stream.
        OSError: the connection is lost.
        asyncio.TimeoutError: nothing arrived for `silence_secs`; raised within twice that time.
        ValueError: the answer is not an event stream.
    """
    reader = EventReader()

    def take(data: bytes) -> None:
        for name, event in reader.feed(data):
            on_event(name, event)

    await _follow(pool, address, head, take, silence_secs=silence_secs)


async def follow_lines(
    pool: EnginePool, address: Address, head: bytes, on_line: Callable[[str], None], *, silence_secs: float
) -> None:
    """As `follow`, for events whose data is a line of text."""
    rest = b""

    def take(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                on_line(line[6:].decode("utf-8", "replace"))

    await _follow(pool, address, head, take, silence_secs=silence_secs)


async def _follow(
    pool: EnginePool, address: Address, head: bytes, on_data: Callable[[bytes], None], *, silence_secs: float
) -> None:
    exchange = _Stream(head, on_data)
    try:
        await exchange.begin(pool, address, None)
        while not exchange.outcome.done():
            exchange.heard = False
            await asyncio.wait([exchange.outcome], timeout=silence_secs)
            if not exchange.outcome.done() and not exchange.heard:
                raise asyncio.TimeoutError
        await exchange.outcome
    finally:
        exchange.leave()
