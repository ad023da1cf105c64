"""The memory of this host that sleeping engines take, all of them together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass
class Sleepers:
    """MiB by booking number. `turn` is held while one falls asleep, so that two never count on the same memory."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _taken: dict[int, int] = field(default_factory=dict)

    @property
    def taken_mb(self) -> int:
        return sum(self._taken.values())

    def asleep(self, number: int, slept_mb: int) -> None:
        self._taken[number] = slept_mb

    def gone(self, number: int) -> None:
        """It is awake, or ended."""
        self._taken.pop(number, None)
