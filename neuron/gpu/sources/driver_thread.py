"""A thread of its own for a driver's library, whose calls block (to a broken GPU for seconds)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

CLOSE_TIMEOUT_SECS = 5.0  # a driver that hangs must not prevent an orderly exit


class DriverThread:
    """Runs one call after another."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def call(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs after the calls before it.

        Raises:
            RuntimeError: the thread is closed. What `work` raises.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def close(self, shut_down: Callable[[], None]) -> None:
        """Runs `shut_down` last and ends the thread, unless the driver hangs. May be called again."""
        with contextlib.suppress(asyncio.TimeoutError, RuntimeError):  # RuntimeError: already closed
            await asyncio.wait_for(self.call(shut_down), CLOSE_TIMEOUT_SECS)
        self._executor.shutdown(wait=False, cancel_futures=True)
