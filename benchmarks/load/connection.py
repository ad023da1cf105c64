"""The client's side of a connection: one request at a time, its answer collected whole and timed."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)
_LAST_CHUNK = b"0\r\n\r\n"  # the engine's payload never holds it


class BadAnswer(Exception):
    """An answer that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True)
class Answer:
    """What came back. Times are from sending the request, in nanoseconds; `pieces` is the number of reads."""

    status: int
    body: bytes
    first_byte_ns: int
    last_byte_ns: int
    pieces: int


Done = Callable[["ClientConnection", "Answer | None"], None]
"""Called once for every request that was sent; None when the connection was lost before the answer was whole."""


def unchunked(data: bytes) -> bytes:
    """The body in a chunked one.

    Raises:
        BadAnswer: the framing is broken, or something follows the end.
    """
    parts, at = [], 0
    try:
        while True:
            line_end = data.index(b"\r\n", at)
            size = int(data[at:line_end].partition(b";")[0], 16)
            at = line_end + 2
            if not size:
                break
            parts.append(data[at : at + size])
            at += size + 2
    except ValueError as error:
        raise BadAnswer("broken chunks") from error
    if data[at:] != b"\r\n":
        raise BadAnswer(f"{data[at:][:40]!r} after the last chunk")
    return b"".join(parts)


class ClientConnection(asyncio.Protocol):
    """Reads an answer by counting its length, or until the last chunk."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.started = False  # the first byte of the awaited answer's body has come
        self._done: Done | None = None
        self._on_first: Callable[[], None] | None = None
        self._pieces: list[bytes] = []
        self._got = 0
        self._head_end = 0
        self._whole: int | None = None  # length of head and body; None: unknown yet, or chunked
        self._status = 0
        self._sent_ns = self._first_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not derive from it

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._done is not None:
            self._finish(None)

    def send(self, request: bytes, done: Done, *, on_first: Callable[[], None] | None = None) -> None:
        """Sends; `on_first` is called at the first byte of the answer's body, `done` at the end.

        Raises:
            ConnectionError: the connection has been closed.
        """
        if self.transport is None:
            raise ConnectionError("closed")
        self._done, self._on_first = done, on_first
        self._pieces, self._got, self._head_end, self._whole = [], 0, 0, None
        self.started = False
        self._sent_ns = time.perf_counter_ns()
        self.transport.write(request)

    def close(self) -> None:
        """Drops the connection and whatever answer is awaited."""
        self._done = None
        if self.transport is not None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._got += len(data)
        if not self._head_end:
            self._read_head()
        if not self.started:
            if not self._head_end or self._got <= self._head_end:
                return
            self._begin()
        if self._whole is not None:
            if self._got >= self._whole:
                self._complete()
        elif data.endswith(_LAST_CHUNK) or (len(data) < 5 and b"".join(self._pieces[-5:]).endswith(_LAST_CHUNK)):
            self._complete()

    def _begin(self) -> None:
        self._first_ns = time.perf_counter_ns()
        self.started = True
        if self._on_first is not None:
            self._on_first()

    def _read_head(self) -> None:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        self._head_end = end + 4
        head = data[: end + 2]
        self._status = int(head[9:12])
        length = _LENGTH.search(head)
        if length is not None:
            self._whole = self._head_end + int(length[1])
        elif not _CHUNKED.search(head):
            self._abort()

    def _abort(self) -> None:
        """An answer that ends with its connection: no keep-alive gateway should send one."""
        self._whole = 1 << 62

    def _complete(self) -> None:
        data = b"".join(self._pieces)
        body = data[self._head_end :]
        now = time.perf_counter_ns()
        try:
            if self._whole is None:
                body = unchunked(body)
            elif len(data) > self._whole:
                raise BadAnswer("more than its length")
        except BadAnswer:
            self._finish(None)
            return
        took_first, took = self._first_ns - self._sent_ns, now - self._sent_ns
        self._finish(Answer(self._status, body, took_first, took, len(self._pieces)))

    def _finish(self, answer: Answer | None) -> None:
        done, self._done, self._pieces = self._done, None, []
        if done is not None:
            done(self, answer)
