"""The events of a stream of chat completions, read from pieces of any size. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from cortex.proxy.translation.interface import Json, engine_object

MAX_EVENT_BYTES: Final = 16 << 20
"""Limit for one event of an engine: a whole tool call with its arguments may be one."""

_DONE: Final = b"[DONE]"


class ChatEvent(NamedTuple):
    """chunk: `data` is a `chat.completion.chunk`. error: `data` is what the engine said, perhaps {}, and `message` says
    it in words. done: the `[DONE]` behind the last chunk."""

    kind: Literal["chunk", "error", "done"]
    data: Json
    message: str = ""


class ChatStreamReader:
    """Ignores comments, ids and event names but `error`. Lines may end in LF or CR LF."""

    __slots__ = ("_data", "_failed", "_pieces", "_size")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line that is not complete yet
        self._size = 0  # of the current event
        self._data: list[bytes] = []
        self._failed = False  # the current event is an error by its name

    def feed(self, piece: bytes) -> Iterator[ChatEvent]:
        """The events that this piece completes. An event that is too long is an error."""
        if b"\n" in piece:
            *lines, piece = b"".join((*self._pieces, piece)).split(b"\n")
            self._pieces = []
            for line in lines:
                yield from self._take(line.rstrip(b"\r"))
            self._size = sum(map(len, self._data))
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
        if self._size > MAX_EVENT_BYTES:
            self._pieces, self._data, self._size = [], [], 0
            yield ChatEvent("error", {}, f"an event of more than {MAX_EVENT_BYTES} bytes")

    def finish(self) -> Iterator[ChatEvent]:
        """The last event of a stream that ends without the empty line behind it."""
        if self._pieces:
            line, self._pieces = b"".join(self._pieces), []
            yield from self._take(line.rstrip(b"\r"))
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[ChatEvent]:
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
        elif line.startswith(b"error:"):  # older llama.cpp, instead of `data:`
            self._data.append(line[6:].strip())
            self._failed = True
        elif line.startswith(b"event:"):
            self._failed = line[6:].strip() == b"error"
        elif not line:
            data, self._data = b"\n".join(self._data), []
            failed, self._failed = self._failed, False
            if data:
                yield _event_of(data, failed=failed)


def _event_of(data: bytes, *, failed: bool) -> ChatEvent:
    if data == _DONE:
        return ChatEvent("done", {})
    found = engine_object(data)
    if found is None:
        return ChatEvent("error", {}, f"the engine sent an event that is not a JSON object: {_quoted(data)}")
    if failed or found.get("error") or found.get("object") == "error":
        return ChatEvent("error", found, error_message(found))
    return ChatEvent("chunk", found)


def error_message(found: Json) -> str:
    """What an engine's error says, in the shapes that engines have: `{"error": {"message"}}`, `{"error": "…"}`,
    `{"message"}`, `{"detail"}`."""
    error = found.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error)
    for said in (error, found.get("message"), found.get("detail")):
        if isinstance(said, str) and said:
            return said
    return "the engine reported an error"


def _quoted(data: bytes) -> str:
    return repr(data[:200].decode("utf-8", "replace"))
