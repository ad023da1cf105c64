"""The client of a stream that has to wait for its engine: its answer is begun early, and it hears comments.

A line `: text` of an event stream is passed over by every parser of such streams, and keeps clients and load balancers
from giving up. Once the answer is begun its status is 200, whatever comes: an error is then the stream's last event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.model_field import asks_for_stream
from cortex.upstream.replica import WaitNote

STREAMED: Final = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
"""Paths whose answers can be event streams."""

MAX_TEXT: Final = 500
"""Characters of a comment."""


class Comments(NamedTuple):
    """When a waiting stream hears the first comment after the beginning of its wait, and each further one after the
    one before; in seconds."""

    first_secs: float
    interval_secs: float


class WaitingStream:
    """One client's wait. `begun`: it has our head, and everything else goes behind that."""

    __slots__ = ("_client", "_comments", "_note", "_request", "_request_id", "_timer", "begun")

    def __init__(
        self,
        client: ClientConnection,
        request: Request,
        request_id: str,
        note: Callable[[], WaitNote],
        comments: Comments,
    ) -> None:
        """`note` is asked for each comment. Needs a running loop."""
        self._client = client
        self._request = request
        self._request_id = request_id
        self._note = note
        self._comments = comments
        self.begun = False
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(
            comments.first_secs, self._begin
        )

    def stop(self) -> None:
        """No further comment."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def finish(self, event: bytes) -> None:
        """Ends the answer with a last event."""
        self.stop()
        last = b"0\r\n\r\n" if self._request.modern else b""
        self._client.transport.write(self.framed(event) + last)

    def framed(self, data: bytes) -> bytes:
        """Bytes of the stream as they are written behind our head; `data` is not empty."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._request.modern else data

    def _begin(self) -> None:
        self._timer = None
        request, client = self._request, self._client
        if not asks_for_stream(request.body):
            return
        self.begun = True
        request.want_unpacked()
        request.keep_alive = request.modern and request.keep_alive and not client.draining
        note = self._note()
        lines = [
            "HTTP/1.1 200 OK",
            "content-type: text/event-stream; charset=utf-8",
            "cache-control: no-cache",
            f"x-request-id: {self._request_id}",
            "x-cortex-cold-start: true",
        ]
        if note.node is not None:
            lines.append(f"x-cortex-node: {note.node}")
        if request.modern:
            lines.append("transfer-encoding: chunked")
        if not request.keep_alive:
            lines.append("connection: close")
        head = "\r\n".join([*lines, "", ""]).encode()
        client.transport.write(head + self.framed(_comment(note)))
        self._again()

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._comments.interval_secs, self._tick)

    def _tick(self) -> None:
        transport = self._client.transport
        if not transport.get_write_buffer_size():  # a client that does not read is not sent more
            transport.write(self.framed(_comment(self._note())))
        self._again()


def _comment(note: WaitNote) -> bytes:
    """One line, whatever clients and neurons name their models and phases."""
    text = " ".join(note.text.split())[:MAX_TEXT]
    return f": {text}\n\n".encode("utf-8", "replace")
