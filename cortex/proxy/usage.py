"""The engine's token counts, read from an answer's bytes as it passes."""

from __future__ import annotations

import re
from json import JSONDecoder
from typing import Any

import msgspec

KEPT_BYTES = 2048
"""Of an answer's end, at least. `usage` is in the last event of a stream, and what vLLM 0.32 writes behind it (fields
that are null, the event's type, `[DONE]`) is under 500 bytes for chats, completions, responses and messages alike; a
`usage` with all of its details is 300. Fields that a client has to ask for may be longer (`prompt_token_ids` in a
plain answer): then it is not found."""

HEAD_BYTES = 512
"""Of the beginning of an answer longer than what is kept: vLLM's reranking has `usage` before its results."""

MOST_CHUNKS = 16
LARGE_CHUNK_BYTES = 512
# Together they bound what is kept of a stream to 10 KiB; with the usual chunk of 190 bytes it is 4 KiB on average.

_ATTEMPTS = 8
"""Objects that are read for one answer: a hostile one could hold hundreds in its last bytes, at 20 us each."""

_MOST_TOKENS = 1 << 53
"""A larger count is a lie, and no float could hold it exactly."""

_NAME = b'"usage"'
# Behind the name. No string holds name and colon: its quotes are escaped, both that before and that behind `usage`.
_TO_OBJECT = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\{)")
_FRAMING = re.compile(rb"\r\n[0-9a-fA-F]+(?:;[^\r\n]*)?\r\n")
_read_json = JSONDecoder().raw_decode


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request. `cached` are those of the prompt that the engine had not to compute: within `prompt` by
    OpenAI's rules, beside it by Anthropic's."""

    prompt: int
    completion: int
    cached: int = 0


class UsageTail:
    """Keeps the last 2 KiB of an answer, and of a longer one the first 512 bytes.

    A few chunks are kept as they came and then joined: adding each to a bytearray costs a realloc each time. `chunks`
    is for the one place where even a call is too much: what is added there has to be joined when MOST_CHUNKS is passed.
    """

    __slots__ = ("_forgotten", "_head", "chunks")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self._head = b""
        self._forgotten = 0  # bytes

    @property
    def fed_bytes(self) -> int:
        """All that has come, kept or not."""
        return self._forgotten + sum(map(len, self.chunks))

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer's body; the framing of a chunked one may be among them."""
        chunks = self.chunks
        chunks.append(chunk)
        if len(chunks) > MOST_CHUNKS or len(chunk) > LARGE_CHUNK_BYTES:
            self.join()

    def usage(self) -> Usage | None:
        """The last `usage` object seen, None when there is none."""
        found = find_usage(b"".join(self.chunks))
        return find_usage(self._head) if found is None else found

    def join(self) -> None:
        """Makes one of the chunks, and forgets what is not kept of them."""
        chunks = self.chunks
        chunk = chunks[-1]
        self._forgotten += sum(map(len, chunks))
        if len(chunk) > KEPT_BYTES:  # only its ends are copied
            chunks[-1:] = (chunk[:HEAD_BYTES], chunk[-KEPT_BYTES:])
        known = b"".join(chunks)
        if len(self._head) < HEAD_BYTES:
            self._head = known[:HEAD_BYTES]
        kept = known[-KEPT_BYTES:]
        self._forgotten -= len(kept)
        chunks[:] = [kept]


def find_usage(tail: bytes | bytearray) -> Usage | None:
    """The last `usage` in the bytes that has counts; never raises.

    OpenAI's names (prompt_tokens, completion_tokens) and Anthropic's (input_tokens, output_tokens). Chunk sizes between
    the bytes do not matter, not even inside `usage`.
    """
    found = _last_usage(tail)
    if found is None and _FRAMING.search(tail) is not None:
        found = _last_usage(_FRAMING.sub(b"", tail))
    return found


def _last_usage(tail: bytes | bytearray) -> Usage | None:
    position, attempts = len(tail), _ATTEMPTS
    while attempts and (position := tail.rfind(_NAME, 0, position)) >= 0:
        match = _TO_OBJECT.match(tail, position + len(_NAME))
        if match is None or tail[position - 1 : position] == b"\\":
            continue
        attempts -= 1
        try:
            found, _ = _read_json(tail[match.end() :].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if (usage := _usage_of(found)) is not None:
            return usage
    return None


def _usage_of(found: dict[str, Any]) -> Usage | None:
    if "prompt_tokens" in found or "completion_tokens" in found:
        prompt, completion, details = "prompt_tokens", "completion_tokens", found.get("prompt_tokens_details")
    elif "input_tokens" in found or "output_tokens" in found:
        prompt, completion, details = "input_tokens", "output_tokens", found.get("input_tokens_details")
    else:
        return None
    cached = details.get("cached_tokens") if isinstance(details, dict) else found.get("cache_read_input_tokens")
    return Usage(_count(found.get(prompt)), _count(found.get(completion)), _count(cached))


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value <= _MOST_TOKENS else 0
