"""An answer of an engine that is held back until it is clear whether the client gets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cortex.http.framing import ChunkedBody
from cortex.http.heads import ResponseHead
from cortex.proxy.answers.answer import Answer
from cortex.upstream.connection import Body

MAX_HELD_BYTES: Final = 65536
"""Of an error; a longer one goes to the client."""


class HeldAnswer(Answer):
    """Collects an error, framed as it came, for `inner`, which has not begun."""

    __slots__ = ("_on_full", "_size", "framing", "head", "inner", "pieces")

    def __init__(self, inner: Answer, head: ResponseHead, body: Body, on_full: Callable[[], None]) -> None:
        """`on_full` is called when more than MAX_HELD_BYTES have come."""
        super().__init__(inner.client, inner.request)
        self.inner = inner
        self.head = head
        self.framing = body
        self.pieces: list[bytes] = []
        self._size = 0
        self._on_full = on_full

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self._size += len(data)
        if self._size > MAX_HELD_BYTES:
            self._on_full()

    def pass_to(self, answer: Answer) -> int:
        """Ends `answer` with the complete one that was held back. Returns the status to log."""
        answer.begin(self.head, self.framing, b"".join(self.pieces))
        return answer.finish(self.head.status)

    def contents(self) -> bytes:
        """What has come, without its framing."""
        data = b"".join(self.pieces)
        return ChunkedBody().start_unpacking(data) if isinstance(self.framing, ChunkedBody) else data
