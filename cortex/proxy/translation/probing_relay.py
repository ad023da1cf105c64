"""A relay for paths that an engine may lack: holds an answer back that may say so until it is clear what it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from cortex.http.framing import ChunkedBody, SizedBody
from cortex.http.heads import ResponseHead
from cortex.http.request import Request
from cortex.proxy.answers.answer import Answer
from cortex.proxy.relay import Relay, RelayListener
from cortex.proxy.translation.lacking import lacks_path
from cortex.upstream.address import Address
from cortex.upstream.connection import Body
from cortex.upstream.pool import EnginePool

MAX_HELD_BYTES: Final = 65536
"""Of an error; a longer one goes to the client."""
MAX_EXCUSE_BYTES: Final = 512
"""Of a 200 that says that the path is unknown; a message is rarely as short."""


class ProbeListener(Protocol):
    def lacks_path(self, held: HeldAnswer) -> None:
        """The engine does not know the request's path, says the answer `held`. Ends the relay; nothing was sent to the
        client."""


class ProbingRelay(Relay):
    """Only the head of an answer and its end cost more than those of a Relay. `probe` must be set before `start`."""

    __slots__ = ("_released", "probe")

    probe: ProbeListener

    def __init__(
        self,
        pool: EnginePool,
        request: Request,
        listener: RelayListener,
        *,
        address: Address,
        head: bytes,
        answer: Answer,
    ) -> None:
        super().__init__(pool, request, listener, address=address, head=head, answer=answer)
        self._released = False  # what was held back goes to the client

    def began(self, head: ResponseHead, body: Body, first: bytes) -> None:
        if head.status in (404, 405) or (
            head.status == 200 and isinstance(body, SizedBody) and len(first) + body.left <= MAX_EXCUSE_BYTES
        ):
            self.status = head.status
            self.answer = HeldAnswer(self.answer, head, body, self._release)
            self.answer.write(first)
        else:
            super().began(head, body, first)

    def ended(self) -> None:
        held = self.answer
        if isinstance(held, HeldAnswer):
            self._connection = None
            if lacks_path(self.status, held.contents()):
                self.probe.lacks_path(held)
                return
            if self.status != 200 and self._listener.refused(self.status, asleep=False):
                return
            self._release()
        super().ended()

    def lost(self, reason: str, *, stale: bool) -> None:
        if isinstance(self.answer, HeldAnswer):
            self._release()
        super().lost(reason, stale=stale)

    def _release(self) -> None:
        held = self.answer
        assert isinstance(held, HeldAnswer)
        self._released = True
        self.answer = held.inner
        super().began(held.head, held.framing, b"".join(held.pieces))

    def _goes_elsewhere(self, head: ResponseHead, first: bytes) -> bool:
        return not self._released and super()._goes_elsewhere(head, first)


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
