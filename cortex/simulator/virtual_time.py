"""An asyncio event loop in virtual time: when nothing is ready, time jumps to the next timer."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import TypeVar

Result = TypeVar("Result")

RESOLUTION_SECS = 2.0**-24
"""Time is rounded up to a multiple of this (60 ns), so that rounding never fires a timer early."""


def rounded_up(secs: float) -> float:
    """The next representable loop time."""
    return math.ceil(secs / RESOLUTION_SECS) * RESOLUTION_SECS


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s. Supports timers and coroutines that wait for each other; sockets are never polled."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def advance(self, secs: float) -> None:
        """Called before each iteration, with the time until the next timer; 0 when a callback is ready."""
        if secs:
            self._now = rounded_up(self._now + secs)


class _JumpingSelector(selectors.SelectSelector):
    """Advances the loop's time instead of waiting."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("simulation deadlock: no callback is ready and no timer is set")
        self._loop.advance(max(0.0, timeout))
        return []


def run_in_virtual_time(main: Coroutine[None, None, Result], loop: VirtualTimeLoop | None = None) -> Result:
    """Runs a coroutine to completion on its own loop, then closes the loop."""
    loop = loop or VirtualTimeLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
