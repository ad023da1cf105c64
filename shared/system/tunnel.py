"""One end of a tunnel: first lines of text, then, once it is joined to another end, bytes for that end.

The neuron with `dial = "out"` and cortex's broker speak this over each connection that the neuron opens
(docs/protocol.md): an empty line from cortex asks whether the neuron is there, one with a port asks for that port, and
after the neuron's `ok` the connection belongs to whatever speaks through it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

MOST_BYTES: Final = 8192
"""Of what is said before the ends are joined."""
OK: Final = b"ok"
REFUSED: Final = b"no "
"""What the reason follows: nothing listens there."""
BUSY: Final = b"busy "
"""What the reason follows: it may work a moment later."""


class TunnelEnd(asyncio.Protocol):
    """A connection whose bytes are first read as lines. `on_lost` is called once it is closed."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport  # set by connection_made
        self.closed = False
        self.on_lost: Callable[[], object] | None = None
        self._arrived = b""
        self._more: asyncio.Future[None] | None = None
        self._other: TunnelEnd | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            if not self._other.closed:  # uvloop's transports raise RuntimeError then
                self._other.transport.write(data)
            return
        self._arrived += data
        if len(self._arrived) > MOST_BYTES:
            self.transport.pause_reading()  # until it is joined
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._wake()
        if self._other is not None:
            self._other.transport.close()  # after what it still has to send
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        if self._other is not None and self._other.reads:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and self._other.reads:
            self._other.transport.resume_reading()

    @property
    def reads(self) -> bool:
        """Whether its transport can be paused and resumed."""
        return not self.closed and not self.transport.is_closing()  # 3.10's TLS transport does not know that it is lost

    def say(self, line: bytes) -> None:
        """Sends a line; to one that has left, nothing."""
        if not self.closed:
            self.transport.write(line + b"\n")

    def refuse(self, reason: str, kind: bytes = REFUSED) -> None:
        """Says why the other side does not get what it asks for, `kind` being REFUSED or BUSY, and closes the
        connection."""
        self.say(kind + " ".join(reason.split()).encode())
        self.transport.close()

    async def read_until(self, mark: bytes) -> bytes:
        """What arrives before `mark`.

        Raises:
            ConnectionError: the connection is closed, or too much arrives.
        """
        while True:
            found, marked, rest = self._arrived.partition(mark)
            if marked:
                self._arrived = rest
                return found
            if self.closed or len(self._arrived) > MOST_BYTES:
                self.transport.abort()
                raise ConnectionError("the connection was closed" if self.closed else "the line is too long")
            self._more = asyncio.get_running_loop().create_future()
            await self._more

    def take_arrived(self) -> bytes:
        """What has arrived and was not read."""
        arrived, self._arrived = self._arrived, b""
        return arrived

    def join(self, other: TunnelEnd) -> None:
        """From now on bytes pass in both directions, each as fast as its receiver takes them, until one end closes."""
        self._other, other._other = other, self
        for end in (self, other):
            if end.reads:
                end.transport.resume_reading()
        for here, there in ((self, other), (other, self)):
            arrived = here.take_arrived()
            if arrived and not there.closed:
                there.transport.write(arrived)
            if here.closed:
                there.transport.close()

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
