"""A request body that is passed on while it arrives, so that an upload is never held whole. No I/O of its own."""

from __future__ import annotations

from collections.abc import Callable

from cortex.http.body_reader import IncomingBody


class StreamedBody:
    """Implements `BodyRest`: passed on while it arrives."""

    __slots__ = ("_body", "_hold_client", "_write", "ended", "left", "passed_on")

    def __init__(self, body: IncomingBody, hold_client: Callable[[bool], None]) -> None:
        """`body`, whose start was taken, reads the rest. `hold_client` stops and resumes reading from the client."""
        self._body = body
        self.left: int | None = body.left
        self.ended = False
        self.passed_on = False
        self._write: Callable[[bytes], None] | None = None
        self._hold_client = hold_client
        hold_client(True)

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.left is None and data else data

    def open(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._hold_client(False)

    def hold_back(self, full: bool) -> None:
        self._hold_client(full)

    def close(self) -> None:
        self._write = None
        self._hold_client(not self.ended)

    def discard(self) -> None:
        """Nothing is stored."""

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
