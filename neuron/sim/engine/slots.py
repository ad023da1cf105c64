"""A limit on concurrent sequences, with a queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Slots:
    """First come, first served. A request may need several slots; one that needs more than all is served alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._empty = asyncio.Event()
        self._empty.set()
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requested slots that are not granted yet."""
        return sum(needed for needed, turn in self._queue if not turn.done())

    @contextlib.asynccontextmanager
    async def take(self, needed: int) -> AsyncIterator[None]:
        """Waits for `needed` slots and holds them inside the body."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((needed, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            # The slots may have been granted in the moment of the cancellation: pass them on.
            if turn.done() and not turn.cancelled():
                self._give_back(needed)
            else:
                self._queue.remove((needed, turn))
                self._admit()
            raise
        try:
            yield
        finally:
            self._give_back(needed)

    async def emptied(self) -> None:
        """Returns when no slot is held or requested."""
        await self._empty.wait()

    def _give_back(self, needed: int) -> None:
        self.running -= needed
        self._admit()
        if not self.running:
            self._empty.set()

    def _admit(self) -> None:
        while self._queue:
            needed, turn = self._queue[0]
            if turn.cancelled():
                return  # its owner is about to remove it and admits the next one
            if self.running and self.running + needed > self._total:
                return
            self._queue.popleft()
            self.running += needed
            self._empty.clear()
            turn.set_result(None)
