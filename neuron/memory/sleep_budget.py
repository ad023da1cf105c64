"""Host memory that sleeping engines take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass
class SleepBudget:
    """MiB by booking number. Hold `lock` while an engine falls asleep, so that two cannot count on the same memory."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _taken: dict[int, int] = field(default_factory=dict)

    @property
    def taken_mb(self) -> int:
        return sum(self._taken.values())

    def take(self, number: int, mb: int) -> None:
        self._taken[number] = mb

    def release(self, number: int) -> None:
        """The engine is awake, or ended."""
        self._taken.pop(number, None)
