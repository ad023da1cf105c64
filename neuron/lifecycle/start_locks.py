"""One start at a time on each GPU: engines that profile a device at the same time count each other's memory as their
own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection


class StartTurns:
    """Devices that are being started on, by index. Whoever comes first goes first, device by device."""

    def __init__(self) -> None:
        self._locks: dict[int, asyncio.Lock] = {}

    def busy(self, devices: Collection[int]) -> bool:
        """True when somebody has, or waits for, one of them."""
        return any(self._lock(index).locked() for index in devices)

    @contextlib.asynccontextmanager
    async def turn(self, devices: Collection[int]) -> AsyncIterator[None]:
        """Inside, nobody else starts on any of the devices. Taken in order, so that two that want the same ones never
        wait for each other."""
        async with contextlib.AsyncExitStack() as stack:
            for index in sorted(devices):
                await stack.enter_async_context(self._lock(index))
            yield

    def _lock(self, index: int) -> asyncio.Lock:
        return self._locks.setdefault(index, asyncio.Lock())
