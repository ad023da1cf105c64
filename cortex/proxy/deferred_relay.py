"""A relay whose client has a head already: the engine's answer goes behind the comments that it heard."""

from __future__ import annotations

import time
from typing import Final

from cortex.http import headers as names
from cortex.http.connection import ClientConnection
from cortex.http.framing import ChunkedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.error_event import engine_error_event
from cortex.proxy.keep_alive import WaitingStream
from cortex.proxy.relay import Listener, Relay, is_event_stream
from cortex.upstream.connection import Body
from cortex.upstream.pool import Address, EnginePool

MAX_ERROR_BYTES: Final = 65536
"""Of an engine's error; what is longer is cut, and then no JSON any more."""


class DeferredRelay(Relay):
    """An event stream passes as ever. Anything else becomes the last event. `status` is the engine's, and 502 where it
    says 200 and sends no event stream."""

    __slots__ = ("_error", "_reframed", "_waiting")

    def __init__(
        self,
        pool: EnginePool,
        client: ClientConnection,
        request: Request,
        listener: Listener,
        *,
        address: Address,
        head: bytes,
        waiting: WaitingStream,
    ) -> None:
        """`head` is the request's for the engine."""
        super().__init__(pool, client, request, listener, address=address, head=head, extra=b"")
        self._waiting = waiting
        self._reframed = False  # the engine's bytes become chunks of ours
        self._error: bytearray | None = None  # the engine's, as it comes

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        if head.status >= 502 and self._goes_elsewhere(head):
            return
        self._waiting.stop()
        self.first_byte_at = time.monotonic()
        self.status = head.status
        self._body = body
        self._head = b""
        self._request.forget()
        straight = False
        if not _passes(head):
            self._error = bytearray()
        elif not isinstance(body, ChunkedBody):
            self._reframed = True
        elif self._request.modern:
            straight = True
        if isinstance(body, ChunkedBody) and not straight:
            first = body.start_unpacking(first)
            self._unpacked = body
        self._events = self._error is None
        if first:
            self._take(first)
        if straight and not body.ended:
            assert self._connection is not None
            self._connection.pass_straight(self._client.transport.write, self._tail)

    def passed(self, data: bytes) -> None:
        if self._unpacked is not None:
            data = self._unpacked.take()
        if data:
            self._take(data)

    def ended(self) -> None:
        self._connection = None
        if self._error is not None:
            event = engine_error_event(self._request.path, self.status, bytes(self._error))
            if self.status < 400:
                self.status = 502
            self._waiting.finish(event)
        elif self._reframed and self._request.modern:
            self._client.transport.write(b"0\r\n\r\n")
        self._listener.done()

    def _take(self, data: bytes) -> None:
        if self._error is not None:
            self._error += data[: MAX_ERROR_BYTES - len(self._error)]
            return
        self._tail.feed(data)
        self._client.transport.write(self._waiting.framed(data) if self._reframed else data)

    def _tell_of_loss(self, reason: str) -> None:
        if self._error is not None or self._reframed:
            self._waiting.finish(b"\n\n" + self._last_event(reason))
        else:
            super()._tell_of_loss(reason)


def _passes(head: ResponseHead) -> bool:
    """True for what can go behind the head that the client has."""
    content_type = head.named.get(names.CONTENT_TYPE)
    return (
        head.status == 200
        and content_type is not None
        and is_event_stream(content_type)
        and names.CONTENT_ENCODING not in head.named
    )
