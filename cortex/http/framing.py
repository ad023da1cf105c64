"""Body framing: finds the end of a body by counting bytes as they pass. Pure.

`feed` takes bytes as they arrive and returns those that can be passed on, unchanged. `ended` is set at the end of the
body; `excess` is what followed it.
"""

from __future__ import annotations

import re
from typing import Final

MAX_SIZE_LINE: Final = 256
"""Maximum length of a size line, with extensions."""
MAX_TRAILERS: Final = 16384
"""Maximum length of the last chunk with its trailer fields."""
MAX_PADDING: Final = 65536
"""Most missing bytes that `cut_off` fills in."""

# Strict: Python's int() would also accept signs, blanks, underscores and 0x.
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\x00]*)?")
_TRAILER: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\x00]*")
SMALL: Final = {b"%x" % size: size for size in range(1, 4096)}
"""Chunks up to this size, nearly all in a stream, have their size line looked up instead of parsed."""

_LONGEST_FRAMED: Final = 4096


def _prefixes() -> list[bytes]:
    """Size lines, indexed by the length of the whole chunk. Lengths that no chunk can have map to b"\\n", which never
    begins a chunk."""
    prefixes = [b"\n"] * (_LONGEST_FRAMED + 1)
    for size in range(1, _LONGEST_FRAMED):
        line = b"%x\r\n" % size
        framed = len(line) + size + 2
        if framed <= _LONGEST_FRAMED:
            prefixes[framed] = line
    return prefixes


PREFIXES: Final = _prefixes()
"""Recognizes a whole chunk at a chunk boundary with one look-up and one comparison."""


class BadFraming(Exception):
    """The body violates its framing."""


class SizedBody:
    """A body of known length (Content-Length, or no body)."""

    __slots__ = ("ended", "excess", "left")

    def __init__(self, length: int) -> None:
        self.left = length
        self.ended = length == 0
        self.excess = b""

    def feed(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left > 0:
            return data
        self.ended = True
        if self.left < 0:
            data, self.excess = data[: self.left], data[self.left :]
            self.left = 0
        return data


class BodyUntilClose:
    """A body that ends with its connection."""

    __slots__ = ("ended", "excess")

    def __init__(self) -> None:
        self.ended = False
        self.excess = b""

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedBody:
    """A chunked body. Framing passes only when complete, so `cut_off` can still close a cut body.

    With `unpack`, `payload` collects the contents of the chunks.
    """

    __slots__ = ("_held", "_left", "ended", "excess", "payload")

    def __init__(self, *, unpack: bool = False) -> None:
        self.ended = False
        self.excess = b""
        self.payload: list[bytes] | None = [] if unpack else None
        self._left = 0  # missing bytes of the current chunk with its CRLF; 0: a size line follows
        self._held = b""  # incomplete framing

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
            self._held = b""
        size = len(data)
        start, position = 0, self._left  # start of the current chunk's contents, and end of the chunk
        while True:
            if position:
                if self.payload is not None:
                    self.payload.append(data[start : position - 2])
                if position > size:
                    return self._cut_in_chunk(data, position - size)
                if data[position - 2 : position] != b"\r\n":
                    raise BadFraming("a chunk does not end with CRLF")
            if position == size:
                self._left = 0
                return data
            line_end = data.find(b"\r\n", position, position + MAX_SIZE_LINE)
            if line_end < 0:
                return self._cut_in_line(data, position)
            token = data[position:line_end]
            length = SMALL.get(token) or _chunk_size(token)
            if length == 0:
                return self._last_chunk(data, position, line_end)
            start = line_end + 2
            position = start + length + 2

    def start_unpacking(self, fed: bytes) -> bytes:
        """Collects contents from now on. Returns the contents in `fed`, the bytes that `feed` has returned so far."""
        again = ChunkedBody(unpack=True)
        again.feed(fed)
        self.payload = []
        return again.take()

    @property
    def between(self) -> bool:
        """The next byte begins a chunk and nothing is held back."""
        return not self._left and not self._held and not self.ended

    @property
    def at_chunk_end(self) -> bool:
        """What `feed` has returned ends with a chunk, or nothing has come."""
        return not self._left and not self.ended

    def take(self) -> bytes:
        """The contents collected since the last call."""
        assert self.payload is not None
        taken = b"".join(self.payload)
        self.payload.clear()
        return taken

    def cut_off(self, last: bytes) -> bytes | None:
        """Closes a body whose sender was lost: fills the current chunk with line feeds, then adds `last` as a chunk
        and the end. None if too much of the chunk is missing."""
        missing = max(self._left - 2, 0)
        if missing > MAX_PADDING:
            return None
        filled = b"\n" * missing + b"\r\n" if self._left else b""
        return b"%b%x\r\n%b\r\n0\r\n\r\n" % (filled, len(last), last)

    def _cut_in_chunk(self, data: bytes, left: int) -> bytes:
        """The chunk continues in the next piece; the CR at its end is held back until its LF arrives."""
        if left == 1:
            if data[-1:] != b"\r":
                raise BadFraming("a chunk does not end with CRLF")
            self._left, self._held = 2, data[-1:]
            return data[:-1]
        self._left = left
        return data

    def _cut_in_line(self, data: bytes, position: int) -> bytes:
        line = data[position:]
        if len(line) >= MAX_SIZE_LINE:
            raise BadFraming("a chunk's size line is too long")
        if not _begins_size_line(line):
            raise BadFraming(f"invalid chunk size: {line[:32]!r}")
        self._left, self._held = 0, line
        return data[:position]

    def _last_chunk(self, data: bytes, position: int, line_end: int) -> bytes:
        """The last chunk with its trailer fields, passed on only when complete."""
        end = data.find(b"\r\n\r\n", line_end)
        if end < 0:
            if len(data) - position > MAX_TRAILERS:
                raise BadFraming("the trailer fields are too long")
            self._left, self._held = 0, data[position:]
            return data[:position]
        for line in data[line_end + 2 : end].split(b"\r\n") if end > line_end else ():
            if _TRAILER.fullmatch(line) is None:
                raise BadFraming(f"invalid trailer field: {line[:32]!r}")
        end += 4
        self.ended = True
        if end < len(data):
            data, self.excess = data[:end], data[end:]
        return data


def _chunk_size(line: bytes) -> int:
    match = _SIZE.fullmatch(line)
    if match is None:
        raise BadFraming(f"invalid chunk size: {line[:32]!r}")
    return int(match[1], 16)


_BEGINNING: Final = re.compile(rb"[0-9A-Fa-f]{0,15}(?:[ \t]*(?:;[^\r\n\x00]*)?\r?)?")


def _begins_size_line(line: bytes) -> bool:
    """Detects invalid data early, without waiting for the rest of the line."""
    return _BEGINNING.fullmatch(line) is not None
