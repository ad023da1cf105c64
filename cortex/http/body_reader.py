"""Collects a request's body as it arrives. No I/O."""

from __future__ import annotations

from cortex.http.framing import BadFraming, ChunkedBody, SizedBody
from shared.errors import InvalidRequest, RequestTooLarge


class IncomingBody:
    """Collects a body of a known length (in bytes), or a chunked one (`length` None)."""

    __slots__ = ("_framing", "_max_bytes", "_pieces", "_size")

    def __init__(self, length: int | None, max_bytes: int) -> None:
        """Raises RequestTooLarge if `length` exceeds `max_bytes`."""
        self._framing = ChunkedBody(unpack=True) if length is None else SizedBody(length)
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._size = length or 0
        self._check_size()

    def feed(self, data: bytes) -> bytes | None:
        """Takes the next bytes. Returns those after the end of the body, None while the body is incomplete.

        Raises:
            InvalidRequest: the framing is invalid.
            RequestTooLarge: the body exceeds `max_bytes`.
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
        if data:
            self._pieces.append(data)
        return framing.excess if framing.ended else None

    def whole(self) -> bytes:
        """The complete body. Call once, at its end."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _check_size(self) -> None:
        if self._size > self._max_bytes:
            raise RequestTooLarge(f"the request body exceeds {self._max_bytes} bytes")
