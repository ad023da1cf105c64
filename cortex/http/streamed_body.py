"""A request body that is passed on while it arrives, so that an upload is never held whole. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable

from cortex.http.body_reader import IncomingBody


class StreamedBody:
    """The part of a body behind what the request was recognized by (`Request.body`).

    `left` is its length in bytes, None if unknown. `passed_on`: some of it is at an engine, so the request cannot be
    sent again. `ended`: all of it has arrived.
    """

    __slots__ = ("_body", "_hold_back", "_write", "ended", "left", "passed_on")

    def __init__(self, body: IncomingBody, hold_back: Callable[[bool], None]) -> None:
        """`body`, whose start was taken, reads the rest. `hold_back` stops and resumes reading from the client."""
        self._body = body
        self.left = body.left
        self.ended = False
        self.passed_on = False
        self._write: Callable[[bytes], None] | None = None
        self._hold_back = hold_back
        hold_back(True)

    def framed(self, data: bytes) -> bytes:
        """`data` as the engine's request head announces it."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.left is None and data else data

    def open(self, write: Callable[[bytes], None]) -> None:
        """An engine takes the body from now on."""
        self._write = write
        self._hold_back(False)

    def close(self) -> None:
        """The engine takes no more. The rest waits for another one."""
        self._write = None
        self._hold_back(not self.ended)

    def feed(self, data: bytes) -> bytes | None:
        """Passes the next bytes on; they are dropped if the engine has gone. Returns and raises as
        `IncomingBody.feed`."""
        rest = self._body.feed(data)
        data = self._body.take()
        self.ended = rest is not None
        write = self._write
        if write is not None:
            self.passed_on = True
            if data:
                write(self.framed(data))
            if self.ended and self.left is None:
                write(b"0\r\n\r\n")
        return rest
