"""Virtual time: what is to happen, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Seconds since the begin of the simulation. Called, it tells the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Action]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, action: Action) -> None:
        """Has something happen; at the same moment, in the order of the calls. A time that is past is now."""
        self._count += 1
        heapq.heappush(self._due, (max(when, self.now), self._count, action))

    def step(self) -> bool:
        """Lets the next thing happen; False when nothing is due any more."""
        if not self._due:
            return False
        self.now, _, action = heapq.heappop(self._due)
        action()
        return True
