"""Takes the usage event out of a stream whose client did not ask for it."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from cortex.http import headers as names
from cortex.http.event_stream import is_event_stream
from cortex.http.framing import ChunkedBody
from cortex.http.heads import ResponseHead
from cortex.proxy.answers.answer import NEVER_STRAIGHT, Answer
from cortex.routing.stream_usage import StreamUsage
from cortex.upstream.connection import Body
from cortex.upstream.usage import Usage, find_usage
from shared.errors import ServiceError

MAX_HELD_BYTES: Final = 65536
"""Of an event that is not complete, and of events that wait for the fingerprint. More passes as it comes."""

_EVENT_END: Final = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_PARTIAL_END: Final = 3
"""Bytes at the end of a piece that may begin the end of an event."""
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_FINISHES: Final = re.compile(rb'"finish_reason": ?"')
_GOES_ON: Final = re.compile(
    rb'"finish_reason": ?null(?:, ?"\w{1,32}": ?null)*\}\](?:, ?"\w{1,32}": ?null)*\}(?:\n\n|\r\n\r\n)\Z'
)
"""The end of an event that has a choice which goes on: no other event ends so."""
_LAST_BRACE: Final = re.compile(rb"\}\](\})[\r\n]*\Z")
_FINGERPRINT: Final = b'"system_fingerprint"'


class UsageEventFilter:
    """Finds the event with `usage` and no choices in a stream's contents, whatever pieces they come in, and removes it.

    Only whole events pass: a part of one says nothing to a client. vLLM puts `system_fingerprint` into that event, but
    into the events that end a choice if it sends no usage. There it is put back; those of an engine's first stream wait
    until its fingerprint is known.
    """

    __slots__ = ("_engine", "_long", "_partial", "_waiting", "_waiting_bytes", "straight_end", "usage_event")

    def __init__(self, engine: StreamUsage) -> None:
        self._engine = engine
        self._partial = b""
        self._long = False  # within an event that is too long to be the one
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.usage_event: bytes | None = None
        self.straight_end = b""  # how events end that need not be looked at; b"": none is known

    @property
    def idle(self) -> bool:
        """The next byte begins an event, and nothing is held back."""
        return not self._partial and not self._long and not self._waiting

    def feed(self, data: bytes) -> bytes:
        """What can pass of the next bytes."""
        if self._partial:
            data, self._partial = self._partial + data, b""
        passed: list[bytes] = []
        at = 0
        for match in _EVENT_END.finditer(data):
            self._take(data[at : match.end()], passed)
            at = match.end()
        if at < len(data):
            self._keep(data[at:], passed)
        return b"".join(passed)

    def finish(self) -> bytes:
        """What can pass now that no more comes."""
        passed: list[bytes] = []
        if self._partial:
            last, self._partial = self._partial, b""
            cut_off = self._may_be_usage(last) and not self._is_usage(last)
            if not cut_off:
                self._take(last, passed)
        self._release(passed)
        return b"".join(passed)

    def _keep(self, rest: bytes, passed: list[bytes]) -> None:
        """Keeps the beginning of an event."""
        if not self._long and rest.startswith(b":"):  # a comment need not have an empty line behind it
            line_end = rest.rfind(b"\n") + 1
            comment = rest[:line_end]
            if b"\ndata" not in comment and b"\nevent" not in comment:
                self._pass(comment, passed)
                rest = rest[line_end:]
        if self._long or len(rest) > MAX_HELD_BYTES:
            self._long = True
            self._pass(rest[:-_PARTIAL_END], passed)
            rest = rest[-_PARTIAL_END:]
        self._partial = rest

    def _take(self, event: bytes, passed: list[bytes]) -> None:
        if self._long:
            self._long = False
            self._pass(event, passed)
            return
        if self._may_be_usage(event) and self._is_usage(event):
            self._release(passed)
            return
        if _FINISHES.search(event) is not None:
            self._finish_choice(event, passed)
            return
        ending = _GOES_ON.search(event)
        if ending is not None:
            self.straight_end = ending[0]
        elif event.startswith(b"data: [DONE]"):
            self._release(passed)
        self._pass(event, passed)

    def _finish_choice(self, event: bytes, passed: list[bytes]) -> None:
        fingerprint = self._engine.fingerprint
        if fingerprint is None and _LAST_BRACE.search(event) is not None and _FINGERPRINT not in event:
            self._waiting.append(event)
            self._waiting_bytes += len(event)
        else:
            self._pass(_with(event, fingerprint or b""), passed)

    def _pass(self, data: bytes, passed: list[bytes]) -> None:
        if not self._waiting:
            passed.append(data)
            return
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > MAX_HELD_BYTES:
            self._release(passed)

    def _release(self, passed: list[bytes]) -> None:
        """Passes on what waited for the fingerprint."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        fingerprint = self._engine.fingerprint or b""
        passed += (_with(each, fingerprint) if _FINISHES.search(each) is not None else each for each in waiting)

    def _may_be_usage(self, event: bytes) -> bool:
        return b'"usage"' in event and _NO_CHOICES.search(event) is not None

    def _is_usage(self, event: bytes) -> bool:
        """True for the event with the usage, from which this learns."""
        try:
            found: Any = msgspec.json.decode(_data_of(event))
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or found.get("choices") != [] or not isinstance(found.get("usage"), dict):
            return False
        self.usage_event = event
        fingerprint = found.get("system_fingerprint")
        known = b',"system_fingerprint":' + msgspec.json.encode(fingerprint) if isinstance(fingerprint, str) else b""
        self._engine.fingerprint = known
        return True


def _with(event: bytes, fingerprint: bytes) -> bytes:
    """An event that ends a choice, with the fingerprint as its last member."""
    place = _LAST_BRACE.search(event) if fingerprint and _FINGERPRINT not in event else None
    return event if place is None else event[: place.start(1)] + fingerprint + event[place.start(1) :]


def _data_of(event: bytes) -> bytes:
    """The contents of an event."""
    lines = event.splitlines()
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


class UnaskedUsage(Answer):
    """`inner` gets what the engine would have sent if it had not been asked for usage, in chunks of our own. Whole
    chunks that are certainly not concerned pass straight (`straight_end`)."""

    __slots__ = ("_engine", "_filter", "_framing", "_inner")

    def __init__(self, inner: Answer, engine: StreamUsage) -> None:
        super().__init__(inner.client, inner.request)
        self.tail = inner.tail
        self._inner = inner
        self._engine = engine
        self._filter: UsageEventFilter | None = None
        self._framing = ChunkedBody()

    def begin(self, head: ResponseHead, body: Body, first: bytes) -> bool:
        named, inner = head.named, self._inner
        stream = head.status == 200 and names.CONTENT_ENCODING not in named
        if not stream or not is_event_stream(named.get(names.CONTENT_TYPE, b"")):
            straight = inner.begin(head, body, first)
            self.body, self.unpacked = inner.body, inner.unpacked
            self.events, self.in_chunks = inner.events, inner.in_chunks
            return straight
        self.body = body
        if isinstance(body, ChunkedBody):
            first = body.start_unpacking(first)
            self.unpacked = body
        self._filter = UsageEventFilter(self._engine)
        head.named = {kind: value for kind, value in named.items() if kind != names.CONTENT_LENGTH}
        straight = inner.begin(head, self._framing, self._framed(self._filter.feed(first)))
        self.events, self.in_chunks = inner.events, inner.in_chunks
        self._look_ahead(self._filter)
        return straight and self.unpacked is not None

    def write(self, data: bytes) -> None:
        events = self._filter
        if events is None:
            self._inner.write(data)
            return
        if self.unpacked is not None:
            data = self.unpacked.take()
        passed = self._framed(events.feed(data))
        if passed:
            self._inner.write(passed)
        self._look_ahead(events)

    def finish(self, status: int) -> int:
        if self._filter is not None:
            self._inner.write(self._framed(self._filter.finish()) + self._framing.feed(b"0\r\n\r\n"))
        return self._inner.finish(status)

    def lose(self, error: ServiceError, model: str) -> None:
        if self._filter is not None:
            passed = self._framed(self._filter.finish())
            if passed:
                self._inner.write(passed)
        self._inner.lose(error, model)

    def break_silence(self, text: str) -> None:
        self._inner.break_silence(text)

    def refusal(self) -> bytes:
        return self._inner.refusal()

    def usage(self) -> Usage | None:
        event = None if self._filter is None else self._filter.usage_event
        return super().usage() if event is None else find_usage(event)

    def _look_ahead(self, events: UsageEventFilter) -> None:
        end = events.straight_end
        self.straight_end = end + b"\r\n" if end and events.idle else NEVER_STRAIGHT

    def _framed(self, data: bytes) -> bytes:
        return self._framing.feed(b"%x\r\n%b\r\n" % (len(data), data)) if data else b""
