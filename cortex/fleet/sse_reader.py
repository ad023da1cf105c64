"""Server-sent events, read from pieces of any size. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_EVENT_BYTES = 1 << 20
"""Limit for one line, and for the data of one event."""


class EventReader:
    """Ignores comments, ids, and events whose data is not JSON."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line that is not complete yet
        self._size = 0
        self._name = "message"
        self._data = ""

    def feed(self, piece: bytes) -> Iterator[tuple[str, Any]]:
        """(event name, JSON data) of the events that this piece completes.

        Raises:
            ValueError: a line, or an event, is too long.
        """
        if b"\n" not in piece:
            self._hold(piece)
            return
        *lines, rest = b"".join((*self._pieces, piece)).split(b"\n")
        self._pieces, self._size = [], 0
        self._hold(rest)
        for raw in lines:
            line = raw.decode("utf-8", "replace").rstrip("\r")
            if line.startswith("event:"):
                self._name = line[6:].strip()
            elif line.startswith("data:"):
                self._data += line[5:].strip()
                if len(self._data) > MAX_EVENT_BYTES:
                    raise ValueError("event too long")
            elif not line:
                name, data = self._name, self._data
                self._name, self._data = "message", ""
                parsed = _parsed(data) if data else None
                if parsed is not None:
                    yield name, parsed

    def _hold(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_EVENT_BYTES:
            raise ValueError("line of the event stream too long")
        if piece:
            self._pieces.append(piece)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
