"""One start at a time on each GPU: engines that profile a device at the same time count each other's memory as their
own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection


class StartTurns:
    """Devices on which an engine starts, by index. First come, first served, per device."""

    def __init__(self) -> None:
        self._locks: dict[int, asyncio.Lock] = {}

    def busy(self, devices: Collection[int]) -> bool:
        """True if one of them is taken or waited for."""
        return any(self._lock(index).locked() for index in devices)

    @contextlib.asynccontextmanager
    async def turn(self, devices: Collection[int]) -> AsyncIterator[None]:
        """Inside the body no other engine starts on these devices. Taken in order, so that two callers cannot
        deadlock."""
        async with contextlib.AsyncExitStack() as stack:
            for index in sorted(devices):
                await stack.enter_async_context(self._lock(index))
            yield

    def _lock(self, index: int) -> asyncio.Lock:
        return self._locks.setdefault(index, asyncio.Lock())
