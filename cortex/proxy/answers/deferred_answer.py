"""The engine's answer to a client that already has a 200 head and signs of life."""

from __future__ import annotations

from typing import Final

from cortex.http import headers as names
from cortex.http.connection import ClientConnection
from cortex.http.event_stream import is_event_stream
from cortex.http.framing import ChunkedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.answers.error_event import engine_error_event
from cortex.proxy.answers.keep_alive import KeepAliveStream
from cortex.upstream.connection import Body
from shared.errors import ServiceError, UpstreamError
from shared.protocol import ErrorCode

MAX_ERROR_BYTES: Final = 65536
"""Longest error of an engine that is kept whole. A longer one is truncated, and then not valid JSON."""


class DeferredAnswer(Answer):
    """Passes an event stream on after the comments. Any other answer becomes the last event."""

    __slots__ = ("_error", "_keep_alive", "_reframed")

    def __init__(self, client: ClientConnection, request: Request, *, keep_alive: KeepAliveStream) -> None:
        super().__init__(client, request)
        self._keep_alive = keep_alive
        self._reframed = False  # the engine's bytes go into our own chunks
        self._error: bytearray | None = None  # collects an answer that is not an event stream

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        self._keep_alive.stop()
        self.body = body
        straight = False
        if not _can_follow(head):
            self._error = bytearray()
        elif not isinstance(body, ChunkedBody):
            self._reframed = True
        elif self.request.modern:
            straight = True
        if isinstance(body, ChunkedBody) and not straight:
            first = body.start_unpacking(first)
            self.unpacked = body
        self.events = self._error is None
        self.in_chunks = self.request.modern
        if first:
            self._take(first)
        return straight

    def write(self, data: bytes) -> None:
        if self.unpacked is not None:
            data = self.unpacked.take()
        if data:
            self._take(data)

    def finish(self, status: int) -> int:
        """Returns 502 for a success that is not an event stream."""
        if self._error is not None:
            self._keep_alive.finish(engine_error_event(self.request.path, status, bytes(self._error)))
            return 502 if status < 400 else status
        if self._reframed and self.request.modern:
            self.client.transport.write(b"0\r\n\r\n")
        return status

    def refusal(self) -> bytes:
        return bytes(self._error or b"")

    def lose(self, error: ServiceError, model: str) -> None:
        if self._error is not None:
            self._keep_alive.finish(self.lost_event(error, model))
        elif self._reframed:
            self._keep_alive.finish((b"" if self.between_events else b"\n\n") + self.lost_event(error, model))
        else:
            super().lose(error, model)

    def _take(self, data: bytes) -> None:
        if self._error is not None:
            self._error += data[: MAX_ERROR_BYTES - len(self._error)]
            return
        self.tail.feed(data)
        self.client.transport.write(self._keep_alive.framed(data) if self._reframed else data)


def _can_follow(head: ResponseHead) -> bool:
    """True if the body can follow the head that the client already has."""
    content_type = head.named.get(names.CONTENT_TYPE)
    return (
        head.status == 200
        and content_type is not None
        and is_event_stream(content_type)
        and names.CONTENT_ENCODING not in head.named
    )


class DeferredJson(Answer):
    """Passes any JSON on behind the white space, also that of an error: its status can no longer be told."""

    __slots__ = ("_keep_alive", "_passes")

    def __init__(self, client: ClientConnection, request: Request, *, keep_alive: KeepAliveStream) -> None:
        super().__init__(client, request)
        self._keep_alive = keep_alive
        self._passes = False

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        self._keep_alive.stop()
        self.body = body
        content_type = head.named.get(names.CONTENT_TYPE, b"").partition(b";")[0].strip().lower()
        self._passes = content_type == b"application/json" and names.CONTENT_ENCODING not in head.named
        if isinstance(body, ChunkedBody):
            first = body.start_unpacking(first)
            self.unpacked = body
        self._take(first)
        return False

    def write(self, data: bytes) -> None:
        self._take(data if self.unpacked is None else self.unpacked.take())

    def finish(self, status: int) -> int:
        """Returns 502 for a success that is not JSON."""
        if self._passes:
            if self.request.modern:
                self.client.transport.write(b"0\r\n\r\n")
            return status
        message = f"the engine answered {status} without JSON"
        self._keep_alive.fail(UpstreamError(message, code=ErrorCode.UPSTREAM_ERROR))
        return 502 if status < 400 else status

    def _take(self, data: bytes) -> None:
        if data and self._passes:
            self.tail.feed(data)
            self.client.transport.write(self._keep_alive.framed(data))
