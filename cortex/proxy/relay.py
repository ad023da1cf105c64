"""One request to one engine: connected, sent, its answer handed through, and what happens when either side is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from cortex.http import headers as names
from cortex.http.connection import ClientConnection
from cortex.http.framing import BodyUntilClose, ChunkedBody, SizedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.error_event import error_event
from cortex.upstream.connection import Body, EngineConnection
from cortex.upstream.pool import Address, EnginePool, NoConnection
from cortex.upstream.replica import FailureKind
from cortex.upstream.tail import UsageTail
from cortex.upstream.usage import Usage
from shared.errors import UpstreamError
from shared.protocol import ErrorCode

_ASLEEP: Final = b"x-neuron-sleeping:"
"""The header of the 503 with which an engine says that it sleeps, and would answer if it were woken."""


class Listener(Protocol):
    """Who wanted the answer. Exactly one of the three ends the relay, unless it is abandoned."""

    def unreachable(self, reason: str, kind: FailureKind) -> None:
        """The engine gave no answer at all: nothing has been sent to the client, the request may go elsewhere."""

    def refused(self, status: int, *, asleep: bool) -> bool:
        """The engine answers 502 or 503, because it is asleep perhaps, and nothing of that has been sent to the
        client. True: the request has gone elsewhere. False: the client gets this answer."""

    def done(self) -> None:
        """The client has its answer, or has been told that it gets no more of it (`lost`)."""


class Relay:
    """Implements `engine.Exchange`. `status` is 0 until the answer's head has come; times are monotonic seconds."""

    __slots__ = (
        "_abandoned",
        "_address",
        "_body",
        "_client",
        "_connecting",
        "_connection",
        "_events",
        "_extra",
        "_head",
        "_listener",
        "_pool",
        "_request",
        "_tail",
        "_unpacked",
        "first_byte_at",
        "lost_because",
        "status",
    )

    def __init__(
        self,
        pool: EnginePool,
        client: ClientConnection,
        request: Request,
        listener: Listener,
        *,
        address: Address,
        head: bytes,
        extra: bytes,
    ) -> None:
        """`head` is the request's for the engine; `extra` are our header lines in the answer."""
        self._pool = pool
        self._client = client
        self._request = request
        self._listener = listener
        self._address = address
        self._head = head
        self._extra = extra
        self._connection: EngineConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._body: Body | None = None
        self._unpacked: ChunkedBody | None = None
        self._tail = UsageTail()
        self._events = False
        self._abandoned = False
        self.status = 0
        self.first_byte_at: float | None = None
        self.lost_because: str | None = None

    def start(self) -> None:
        connection = self._pool.take(self._address)
        if connection is None:
            self._connect()
        else:
            self._send(connection)

    def abandon(self) -> None:
        """The client has left."""
        self._abandoned = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None

    def cut_off(self, reason: str) -> None:
        """An answer that has begun ends here, as if its engine were lost."""
        if self._connection is not None:
            self._connection.lose(reason)

    def pause(self) -> None:
        """The client reads too slowly."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    @property
    def sent_bytes(self) -> int:
        """Of the answer's body, its framing included."""
        return self._tail.fed_bytes

    @property
    def events(self) -> bool:
        """The answer is a stream of events."""
        return self._events

    def usage(self) -> Usage | None:
        """The engine's last word on tokens, None without one."""
        return self._tail.usage()

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        if head.status >= 502 and self._goes_elsewhere(head):
            return
        client, request, named = self._client, self._request, head.named
        self.first_byte_at = time.monotonic()
        self.status = head.status
        self._body = body
        self._head = b""
        request.forget()
        lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason), *head.passed, self._extra]
        content_type = named.get(names.CONTENT_TYPE)
        if content_type is not None:
            lines.append(b"content-type: " + content_type)
        packing = named.get(names.CONTENT_ENCODING)
        if packing is not None:
            lines.append(b"content-encoding: " + packing)
        keep_alive = request.keep_alive and not client.draining
        if isinstance(body, SizedBody):
            if names.CONTENT_LENGTH in named:
                lines.append(b"content-length: " + named[names.CONTENT_LENGTH])
        else:
            self._events = packing is None and content_type is not None and is_event_stream(content_type)
            if isinstance(body, BodyUntilClose):
                keep_alive = False
            elif request.modern:
                lines.append(b"transfer-encoding: chunked")
            else:
                first = body.start_unpacking(first)
                self._unpacked = body
                keep_alive = False
        request.keep_alive = keep_alive
        if not keep_alive:
            lines.append(b"connection: close")
        elif not request.modern:
            lines.append(b"connection: keep-alive")
        lines += (b"", first)
        self._tail.feed(first)
        client.transport.write(b"\r\n".join(lines))
        if isinstance(body, ChunkedBody) and self._unpacked is None and not body.ended:
            assert self._connection is not None
            self._connection.pass_straight(client.transport.write, self._tail)

    def passed(self, data: bytes) -> None:
        if self._unpacked is not None:
            data = self._unpacked.take()
        self._tail.feed(data)
        self._client.transport.write(data)

    def ended(self) -> None:
        self._connection = None
        self._listener.done()

    def lost(self, reason: str, *, stale: bool) -> None:
        self._connection = None
        if stale:
            # Closed by the engine at this very moment, as it may any idle connection: once more, on a new one.
            self._connect()
        elif not self.status:
            self._listener.unreachable(reason, "reset")
        else:
            self.lost_because = reason
            self._tell_of_loss(reason)
            self._listener.done()

    def _connect(self) -> None:
        self._connecting = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            await self._pool.connect(self._address, self._send)
        except NoConnection as error:
            self._connecting = None
            self._listener.unreachable(error.reason, error.kind)

    def _send(self, connection: EngineConnection) -> None:
        self._connecting = None
        if self._abandoned:
            connection.abandon()
            return
        self._connection = connection
        connection.send(self, self._head, self._request.body)

    def _goes_elsewhere(self, head: ResponseHead) -> bool:
        """After an answer that says no more than that this engine does not serve now."""
        if head.status > 503:
            return False
        asleep = any(line[: len(_ASLEEP)].lower() == _ASLEEP for line in head.passed)
        if not self._listener.refused(head.status, asleep=asleep):
            return False
        connection, self._connection = self._connection, None
        assert connection is not None
        connection.drop()
        return True

    def _tell_of_loss(self, reason: str) -> None:
        """Never a clean end: an SSE client gets an explicit last event, every other one a cut connection."""
        # The blank line first ends an event that was cut in the middle.
        last = b"\n\n" + self._last_event(reason) if self._events else None
        if last is not None and isinstance(self._body, ChunkedBody) and self._unpacked is None:
            last = self._body.cut_off(last)
        if last is None:
            self._request.keep_alive = False
            self._client.cut()
        else:
            self._client.transport.write(last)

    def _last_event(self, reason: str) -> bytes:
        error = UpstreamError(f"the engine was lost while it answered: {reason}", code=ErrorCode.UPSTREAM_LOST)
        return error_event(self._request.path, error)


def is_event_stream(content_type: bytes) -> bool:
    """True for an answer of server-sent events, whatever parameters the header has."""
    return content_type.partition(b";")[0].strip().lower() == b"text/event-stream"
