"""One timer for all streams of the engine."""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

TICK_SECS = 0.001


class Due(Protocol):
    """A stream that the wheel drives."""

    due: int

    def emit(self) -> int:
        """Sends the due events; returns the ticks until the next call, 0 for none."""


class Wheel:
    """Calls each stream when its tick comes; a tick is a millisecond.

    Every stream keeps its own absolute schedule, so that a late tick delays no later one, and streams that began
    at different times stay spread over the interval. The timer runs only while there is a stream.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots: dict[int, list[Due]] = {}
        self._done_until = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: Due, ticks: int) -> None:
        """Schedules `stream` in this many ticks, at least one."""
        stream.due = self._now() + ticks
        self._put(stream)

    def _now(self) -> int:
        return math.floor(self._loop.time() / TICK_SECS)

    def _put(self, stream: Due) -> None:
        self._slots.setdefault(stream.due, []).append(stream)
        if self._timer is None:
            self._done_until = self._now()
            self._timer = self._loop.call_later(TICK_SECS, self._tick)

    def _tick(self) -> None:
        now = self._now()
        for tick in range(self._done_until + 1, now + 1):
            for stream in self._slots.pop(tick, ()):
                ticks = stream.emit()
                if ticks:
                    stream.due = max(stream.due + ticks, now + 1)
                    self._slots.setdefault(stream.due, []).append(stream)
        self._done_until = now
        self._timer = self._loop.call_later(TICK_SECS, self._tick) if self._slots else None
