"""Signs of life for clients that wait: without them, clients and the proxies before them time out.

An event stream gets comments, which every parser of event streams skips, and Anthropic's clients get `ping` events. A
stream that waits for its engine begins early; then its status is 200 whatever happens, and an error becomes its last
event. A plain JSON answer may begin early as well, with white space, if the configuration says so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Final, NamedTuple

from cortex.http.connection import ClientConnection
from cortex.http.event_stream import EVENT_STREAM_LINES, sign_of_life
from cortex.http.request import Request
from cortex.proxy.answers.answer import own_lines
from cortex.proxy.answers.error_event import error_event
from cortex.proxy.body.model_field import asks_for_stream
from cortex.routing.replica import WaitNote
from shared.errors import ServiceError, event_body, is_anthropic_path

STREAMED: Final = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
"""Paths whose answers may be event streams."""

ALWAYS_JSON: Final = STREAMED | {b"/v1/embeddings", b"/v1/rerank", b"/rerank", b"/v2/rerank", b"/v1/score", b"/score"}
"""Paths whose answers are JSON unless they are event streams."""


class KeepAlivePolicy(NamedTuple):
    """Seconds to the first comment of a client that waits for its model, between its comments, and of silence in any
    other event stream. `whitespace`: plain JSON answers begin early, with white space."""

    first_secs: float
    interval_secs: float
    silence_secs: float
    whitespace: bool = False


class KeepAliveStream:
    """The early answer to one waiting client. `begun`: the head has been sent, and everything else must follow it.
    `events`: as an event stream, otherwise as JSON. `sent_to` is the node that works on the request, None while the
    model is not ready."""

    __slots__ = (
        "_client",
        "_cold",
        "_model_id",
        "_note",
        "_policy",
        "_request",
        "_request_id",
        "_timer",
        "begun",
        "events",
        "sent_to",
    )

    def __init__(
        self,
        client: ClientConnection,
        request: Request,
        request_id: str,
        model_id: str,
        *,
        note: Callable[[str], WaitNote | None],
        policy: KeepAlivePolicy,
        cold: bool,
    ) -> None:
        """`note` gives the progress of a model; `cold`: the request waits for it to load. Needs a running loop."""
        self._client = client
        self._request = request
        self._request_id = request_id
        self._model_id = model_id
        self._note = note
        self._policy = policy
        self._cold = cold
        self.begun = False
        self.events = True
        self.sent_to: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin_later(self) -> None:
        """Begins the answer after `first_secs`, unless stopped."""
        self._timer = asyncio.get_running_loop().call_later(self._policy.first_secs, self.begin)

    def follow(self) -> None:
        """The client has the head of an event stream from an engine that was lost before its first event."""
        self.begun = True
        self._request.refuse_encodings()
        self._schedule()

    def stop(self) -> None:
        """Sends no more signs of life."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fail(self, error: ServiceError) -> None:
        """Ends the answer with an error: the last event, or the whole JSON."""
        if self.events:
            self.finish(error_event(self._request.path, error))
        else:
            self.finish(json.dumps(event_body(error, anthropic=self._request.anthropic)).encode())

    def finish(self, data: bytes) -> None:
        """Ends the answer with `data`, which must not be empty."""
        self.stop()
        last = b"0\r\n\r\n" if self._request.modern else b""
        self._client.transport.write(self.framed(data) + last)

    def framed(self, data: bytes) -> bytes:
        """`data`, which must not be empty, framed as our head says."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._request.modern else data

    def begin_at(self, node: str) -> bool:
        """Begins the answer to a request that waits for an engine on this node. True if it has begun."""
        self.sent_to = node
        self.begin()
        return self.begun

    def begin(self) -> None:
        """Begins the answer, if the request allows it (`begun`)."""
        self._timer = None
        request, client = self._request, self._client
        self.events = request.path in STREAMED and asks_for_stream(request.body)
        if not self.events and not (self._policy.whitespace and request.path in ALWAYS_JSON):
            return
        self.begun = True
        request.refuse_encodings()
        request.keep_alive = request.modern and request.keep_alive and not client.draining
        note = self._current_note()
        lines = [b"HTTP/1.1 200 OK"]
        if self.events:
            lines += (b"content-type: text/event-stream; charset=utf-8", EVENT_STREAM_LINES)
        else:
            lines.append(b"content-type: application/json")
        lines += (
            own_lines(request, self._request_id.encode()),
            b"x-cortex-cold-start: true" if self._cold else b"x-cortex-cold-start: false",
        )
        if note.node is not None:
            lines.append(b"x-cortex-node: " + note.node.encode())
        if request.modern:
            lines.append(b"transfer-encoding: chunked")
        if not request.keep_alive:
            lines.append(b"connection: close")
        client.transport.write(b"\r\n".join([*lines, b"", self.framed(self._sign(note))]))
        self._schedule()

    def _schedule(self) -> None:
        """A request that waits for its model gets its progress often; one at an engine only as often as any stream."""
        secs = self._policy.interval_secs if self._cold else self._policy.silence_secs
        self._timer = asyncio.get_running_loop().call_later(secs, self._tick)

    def _tick(self) -> None:
        transport = self._client.transport
        if not transport.get_write_buffer_size():  # a client that does not read gets no comments
            transport.write(self.framed(self._sign(self._current_note())))
        self._schedule()

    def _sign(self, note: WaitNote) -> bytes:
        return sign_of_life(note.text, ping=is_anthropic_path(self._request.path)) if self.events else b"\n"

    def _current_note(self) -> WaitNote:
        if self.sent_to is not None:
            return WaitNote(text=f"request sent to {self._model_id} on {self.sent_to}", node=self.sent_to)
        return self._note(self._model_id) or WaitNote(text=f"waiting for {self._model_id}")
