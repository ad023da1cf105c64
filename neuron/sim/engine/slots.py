"""Room for so many sequences at once; who comes later waits in line."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Slots:
    """First come, first served. One request may need several slots; more than there are is served alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._empty = asyncio.Event()
        self._empty.set()
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        """Slots asked for and not yet given."""
        return sum(needed for needed, turn in self._queue if not turn.done())

    @contextlib.asynccontextmanager
    async def take(self, needed: int) -> AsyncIterator[None]:
        """Waits for the turn of `needed` slots and holds them inside the body."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((needed, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            # The turn may have come in the very moment of the cancellation: then it is given on.
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
        """Returns when nobody has a turn or waits for one."""
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
                return  # its owner is about to remove it, and admits the next one then
            if self.running and self.running + needed > self._total:
                return
            self._queue.popleft()
            self.running += needed
            self._empty.clear()
            turn.set_result(None)
