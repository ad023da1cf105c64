"""Keep-alive comments for a streaming client that waits for its engine: the answer begins early and contains comments.

Every parser of event streams skips lines such as `: text`, but they keep clients and load balancers from timing out.
Once the answer has begun, its status is 200 whatever happens; an error becomes the last event of the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from cortex.http.connection import ClientConnection
from cortex.http.request import Request
from cortex.proxy.answer import own_lines
from cortex.proxy.body.model_field import asks_for_stream
from cortex.upstream.replica import WaitNote

STREAMED: Final = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
"""Paths whose answers may be event streams."""

MAX_TEXT: Final = 500
"""Maximum characters of a comment."""


class KeepAliveTimes(NamedTuple):
    """Seconds to the first comment, and between comments."""

    first_secs: float
    interval_secs: float


class KeepAliveStream:
    """The early answer to one waiting client. `begun`: the head has been sent, and everything else must follow it.
    `sent_to` is the node that works on the request, None while the model is not ready."""

    __slots__ = ("_client", "_model_id", "_note", "_request", "_request_id", "_timer", "_times", "begun", "sent_to")

    def __init__(
        self,
        client: ClientConnection,
        request: Request,
        request_id: str,
        model_id: str,
        *,
        note: Callable[[str], WaitNote | None],
        times: KeepAliveTimes,
    ) -> None:
        """`note` gives the progress of a model. Needs a running loop."""
        self._client = client
        self._request = request
        self._request_id = request_id
        self._model_id = model_id
        self._note = note
        self._times = times
        self.begun = False
        self.sent_to: str | None = None
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(times.first_secs, self._begin)

    def stop(self) -> None:
        """Sends no more comments."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def finish(self, event: bytes) -> None:
        """Ends the answer with a last event."""
        self.stop()
        last = b"0\r\n\r\n" if self._request.modern else b""
        self._client.transport.write(self.framed(event) + last)

    def framed(self, data: bytes) -> bytes:
        """`data`, which must not be empty, framed as our head says."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._request.modern else data

    def _begin(self) -> None:
        self._timer = None
        request, client = self._request, self._client
        if not asks_for_stream(request.body):
            return
        self.begun = True
        request.refuse_encodings()
        request.keep_alive = request.modern and request.keep_alive and not client.draining
        note = self._current_note()
        lines = [
            "HTTP/1.1 200 OK",
            "content-type: text/event-stream; charset=utf-8",
            "cache-control: no-cache",
            own_lines(request, self._request_id.encode()).decode(),
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
        self._schedule()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._times.interval_secs, self._tick)

    def _tick(self) -> None:
        transport = self._client.transport
        if not transport.get_write_buffer_size():  # a client that does not read gets no comments
            transport.write(self.framed(_comment(self._current_note())))
        self._schedule()

    def _current_note(self) -> WaitNote:
        if self.sent_to is not None:
            return WaitNote(text=f"request sent to {self._model_id} on {self.sent_to}", node=self.sent_to)
        return self._note(self._model_id) or WaitNote(text=f"waiting for {self._model_id}")


def _comment(note: WaitNote) -> bytes:
    """A comment of one line, whatever characters the names of models and phases contain."""
    text = " ".join(note.text.split())[:MAX_TEXT]
    return f": {text}\n\n".encode("utf-8", "replace")
