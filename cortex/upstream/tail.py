"""The last bytes of an answer, kept while it passes."""

from __future__ import annotations

from typing import Final

from cortex.upstream.usage import Usage, find_usage, with_prompt

KEPT_BYTES: Final = 2048
"""Of an answer's end, at least. `usage` is in the last event of a stream, and what vLLM 0.32 appends (fields
that are null, the event's type, `[DONE]`) is under 500 bytes for chats, completions, responses and messages alike; a
`usage` with all of its details is 300. Fields that a client has to ask for may be longer (`prompt_token_ids` in a
plain answer): then it is not found."""

HEAD_BYTES: Final = 512
"""Of the beginning of an answer longer than what is kept: vLLM's reranking has `usage` before its results."""

MOST_CHUNKS: Final = 16
LARGE_CHUNK_BYTES: Final = 512
# Together they bound what is kept of a stream to 10 KiB; with the usual chunk of 190 bytes it is 4 KiB on average.


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
        """Total bytes fed, including discarded ones."""
        total = self._forgotten
        for chunk in self.chunks:
            total += len(chunk)
        return total

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the answer's body; the framing of a chunked one may be among them."""
        chunks = self.chunks
        chunks.append(chunk)
        if len(chunks) > MOST_CHUNKS or len(chunk) > LARGE_CHUNK_BYTES:
            self.join()

    @property
    def start(self) -> bytes:
        """The first bytes of the body: all of a short one, at least 512 of a longer one."""
        return self._head if self._forgotten else b"".join(self.chunks)

    @property
    def end(self) -> bytes:
        """The last bytes of the body, at least 64 of a longer one."""
        return b"".join(self.chunks[-16:])[-64:]

    def usage(self) -> Usage | None:
        """The last `usage` object seen, None when there is none. Anthropic's last one may lack the prompt, which is in
        the first event."""
        found = find_usage(b"".join(self.chunks))
        if found is not None and found.prompt:
            return found
        first = find_usage(self._head)
        if found is None or first is None:
            return first or found
        return with_prompt(found, first)

    def join(self) -> None:
        """Makes one of the chunks, and forgets what is not kept of them."""
        chunks = self.chunks
        chunk = chunks[-1]
        # Only its ends are copied; they may overlap, and then less than nothing is forgotten.
        if len(chunk) > KEPT_BYTES:
            chunks[-1] = chunk[:HEAD_BYTES]
            chunks.append(chunk[-KEPT_BYTES:])
            self._forgotten += len(chunk) - HEAD_BYTES - KEPT_BYTES
        known = b"".join(chunks)
        if len(self._head) < HEAD_BYTES:
            self._head = known[:HEAD_BYTES]
        kept = known[-KEPT_BYTES:]
        self._forgotten += len(known) - len(kept)
        chunks.clear()
        chunks.append(kept)
