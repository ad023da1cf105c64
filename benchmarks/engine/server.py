"""The engine's side of a connection: minimal HTTP, so that the engine does not dominate the measurement."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from benchmarks.engine.answer_spec import AnswerSpec, spec_in
from benchmarks.engine.answers import (
    MODEL,
    STREAM_HEAD,
    head,
    json_answer,
    plain_answer,
    stream_events,
)
from benchmarks.engine.wheel import TICK_SECS, Wheel

_LENGTH = b"\r\ncontent-length:"
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked")
_SPEC_WITHIN = 4096  # the spec is within the first bytes of a body
_HEALTHY = head("200 OK", "text/plain", 0)
_MODELS = json_answer(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 40960}]}
)
_UNKNOWN = json_answer({"detail": "Not Found"}, "404 Not Found")
_GETS = {b"/health": _HEALTHY, b"/v1/models": _MODELS, b"/version": json_answer({"version": "0.32.0"})}


class Stream:
    """One answer that is sent event by event."""

    __slots__ = ("_events", "_left", "_ticks", "due", "transport")

    def __init__(self, transport: asyncio.Transport, spec: AnswerSpec) -> None:
        self.transport: asyncio.Transport | None = transport
        self.due = 0
        self._events = iter(stream_events(spec.chunks))
        self._left = spec.chunks
        self._ticks = max(1, round(spec.interval / TICK_SECS))

    def emit(self) -> int:
        """Sends the next event; returns the ticks until the one after it, 0 at the end or if the client is gone."""
        if self.transport is None:
            return 0
        self.transport.write(next(self._events))
        self._left -= 1
        return self._ticks if self._left else 0


class Engine:
    """State that the connections share."""

    def __init__(self) -> None:
        self.wheel = Wheel()
        self.held: list[Stream] = []
        self.requests = 0
        self.connections = 0

    def release(self) -> None:
        """Lets the held streams continue."""
        held, self.held = self.held, []
        for number, stream in enumerate(held):
            self.wheel.add(stream, 1 + number // 4)

    def stats(self) -> dict[str, int]:
        """For `GET /bench/stats`."""
        return {"requests": self.requests, "connections": self.connections, "held": len(self.held)}


class EngineConnection(asyncio.Protocol):
    """Answers one request after the other, without pipelining."""

    __slots__ = ("_buffer", "_engine", "_left", "_spec", "_stream", "_transport")
    _transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._left = 0  # remaining bytes of a body whose spec is known
        self._spec = AnswerSpec()
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not derive from it
        self._engine.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections -= 1
        if self._stream is not None:
            self._stream.transport = None

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
            if self._left <= 0:
                self._answer(self._spec)
            return
        if self._buffer:
            data = self._buffer + data
        self._buffer = self._request(data)

    def _request(self, data: bytes) -> bytes:
        """Answers a complete request; returns the bytes to keep of an incomplete one."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return data
        if data.startswith(b"GET "):
            self._transport.write(_GETS.get(data.split(b" ", 2)[1].partition(b"?")[0]) or self._get_other(data))
            return b""
        lowered = data[: end + 2].lower()
        at = lowered.find(_LENGTH)
        if at < 0:
            return self._without_length(data, lowered, end + 4)
        at += len(_LENGTH)
        length = int(lowered[at : lowered.index(b"\r\n", at)])
        received = len(data) - end - 4
        if received < min(length, _SPEC_WITHIN):
            if b"\r\nexpect: 100-continue" in lowered and not received:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return data
        if data.startswith(b"POST /bench/release "):
            self._engine.release()
            self._transport.write(_HEALTHY)
            return b""
        spec = spec_in(data[end + 4 : end + 4 + _SPEC_WITHIN])
        if received < length:
            self._spec, self._left = spec, length - received
        else:
            self._answer(spec)
        return b""

    def _without_length(self, data: bytes, lowered_head: bytes, body_at: int) -> bytes:
        """A request with a chunked body, or without a body."""
        if not _CHUNKED.search(lowered_head):
            self._transport.write(_UNKNOWN)
            return b""
        if not data.endswith(b"0\r\n\r\n"):  # no prompt of ours contains this
            return data
        self._answer(spec_in(data[body_at : body_at + _SPEC_WITHIN]))
        return b""

    def _get_other(self, data: bytes) -> bytes:
        if data.startswith(b"GET /bench/stats "):
            return json_answer(self._engine.stats())
        return _UNKNOWN

    def _answer(self, spec: AnswerSpec) -> None:
        self._left = 0
        self._engine.requests += 1
        if not spec.chunks:
            self._transport.write(plain_answer(spec.size))
            return
        if not spec.interval and not spec.hold:
            self._transport.write(STREAM_HEAD + b"".join(stream_events(spec.chunks)))
            return
        stream = self._stream = Stream(self._transport, spec)
        self._transport.write(STREAM_HEAD)
        ticks = stream.emit()
        if spec.hold:
            self._engine.held.append(stream)
        elif ticks:
            self._engine.wheel.add(stream, ticks)
