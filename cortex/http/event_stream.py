"""Server-sent events: their headers, signs of life between them, and where an event ends. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

EVENT_STREAM_LINES: Final = b"cache-control: no-cache\r\nx-accel-buffering: no"
"""Header lines of every event stream, without the final CRLF: proxies must neither keep nor collect it."""

MAX_COMMENT_CHARS: Final = 500

_PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
_LONGEST_END: Final = 4


@lru_cache(maxsize=256)
def is_event_stream(content_type: bytes) -> bool:
    """True for server-sent events, with or without parameters in the header."""
    return content_type.partition(b";")[0].strip().lower() == b"text/event-stream"


def sign_of_life(text: str, *, ping: bool) -> bytes:
    """What a client hears that waits for an event: a comment with `text`, then Anthropic's `ping` event if `ping`.

    Only at the start of a line, between two events. The comment has no blank line behind it: some clients would take
    that for an empty event.
    """
    line = " ".join(text.split())[:MAX_COMMENT_CHARS]  # one line, whatever names of models and phases contain
    comment = f": {line}\n".encode("utf-8", "replace")
    return comment + _PING if ping else comment


def ends_event(sent: bytes, *, in_chunks: bool) -> bool:
    """True if an event stream is between two events. `sent` is the end of what the client has, up to the end of a
    chunk; `in_chunks`: with the framing of chunks."""
    return not sent or (_last_contents(sent) if in_chunks else sent).endswith(_EVENT_ENDS)


def _last_contents(chunks: bytes) -> bytes:
    """The last four bytes, or all, of what the chunks contain."""
    contents = b""
    while chunks.endswith(b"\r\n") and len(contents) < _LONGEST_END:
        chunks = chunks[:-2]
        size = _last_size(chunks)
        if not size:
            return chunks[-_LONGEST_END:] + contents
        contents = chunks[-size:] + contents
        chunks = chunks[:-size].rpartition(b"\r\n")[0]  # without the size line's end
        chunks = chunks[: len(chunks) - len(chunks.rpartition(b"\r\n")[2])]  # without the size line
    return contents


def _last_size(chunks: bytes) -> int:
    """The size of the last chunk, if it is smaller than the longest end of an event; else 0. Its final CRLF is cut."""
    for size in range(1, _LONGEST_END):
        before = chunks[:-size]
        if before.endswith(b"\r\n"):
            line = before[:-2].rpartition(b"\r\n")[2].partition(b";")[0].strip()
            if line.isalnum() and line.lstrip(b"0") == b"%x" % size:
                return size
    return 0
