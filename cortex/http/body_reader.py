"""Collects a request's body as it arrives. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from cortex.http.framing import BadFraming, ChunkedBody, SizedBody
from shared.errors import InvalidRequest, RequestTooLarge

STREAMED_BYTES: Final = 1 << 20
"""A longer body may be passed on while it arrives; a shorter one is complete before its request is handled."""
UNSIZED_BYTES: Final = 1 << 18
"""The same for a chunked body, whose length is unknown."""


class BodyRest(Protocol):
    """The part of a body behind `Request.body`.

    `passed_on`: some of it is at an engine and gone, so the request cannot be sent again. `ended`: nothing more will be
    written.
    """

    ended: bool
    passed_on: bool

    @property
    def left(self) -> int | None:
        """Its length in bytes, None if unknown."""

    def framed(self, data: bytes) -> bytes:
        """`data` as the engine's request head announces it."""

    def open(self, write: Callable[[bytes], None]) -> None:
        """An engine takes it from now on."""

    def hold_back(self, full: bool) -> None:
        """The engine takes no more for now (`full`), or goes on."""

    def close(self) -> None:
        """The engine takes no more. The rest waits for another one."""

    def discard(self) -> None:
        """The request has ended. May be called again."""


class BodySpool(BodyRest, Protocol):
    """Stores a body while it arrives."""

    def write(self, data: bytes) -> None:
        """Adds the next bytes. Raises ServiceError."""


class IncomingBody:
    """Collects a body of a known length (in bytes), or a chunked one (`length` None)."""

    __slots__ = ("_framing", "_max_bytes", "_pieces", "_show_at", "_size", "_spool")

    def __init__(self, length: int | None, max_bytes: int) -> None:
        """Raises RequestTooLarge if `length` exceeds `max_bytes`."""
        self._framing = ChunkedBody(unpack=True) if length is None else SizedBody(length)
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._size = length or 0
        self._spool: BodySpool | None = None
        # The size at which the start is shown, 0 for never. Doubled each time: tiny pieces must not cost a search each.
        self._show_at = UNSIZED_BYTES if length is None else int(length > STREAMED_BYTES)
        self._check_size()

    def feed(self, data: bytes) -> bytes | None:
        """Takes the next bytes. Returns those after the end of the body, None while the body is incomplete.

        Raises:
            InvalidRequest: the framing is invalid.
            RequestTooLarge: the body exceeds `max_bytes`.
            ServiceError: the spool cannot take it.
        """
        framing = self._framing
        try:
            data = framing.feed(data)
        except BadFraming as error:
            raise InvalidRequest(f"cannot read the body: {error}") from error
        if isinstance(framing, ChunkedBody):
            data = framing.take()
            self._size += len(data)
            self._check_size()
        if self._spool is not None:
            self._spool.write(data)
        elif data:
            self._pieces.append(data)
        return framing.excess if framing.ended else None

    @property
    def left(self) -> int | None:
        """Bytes that are missing, None if that is unknown."""
        return self._framing.left if isinstance(self._framing, SizedBody) else None

    def shows_start(self) -> bool:
        """True if it is time to look whether the request can be handled before its body is complete."""
        if not self._show_at:
            return False
        arrived = sum(map(len, self._pieces))
        if arrived < self._show_at:
            return False
        self._show_at = 2 * arrived if arrived < STREAMED_BYTES else 0
        return True

    @property
    def shown(self) -> bool:
        """`shows_start` will not be true again: the request has to wait for its complete body."""
        return not self._show_at

    def put_back(self, data: bytes, spool: BodySpool | None) -> None:
        """Undoes the last `take`. The body goes into `spool` if there is one."""
        self._spool = spool
        if spool is None:
            self._pieces.insert(0, data)
        else:
            spool.write(data)

    def take(self) -> bytes:
        """What has arrived since the last call."""
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken

    def whole(self) -> bytes:
        """The complete body; empty if it is in a spool. Call once, at its end."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _check_size(self) -> None:
        if self._size > self._max_bytes:
            raise RequestTooLarge(f"the request body exceeds {self._max_bytes} bytes")
