"""Which engines lack a path, so that requests to it are translated at once. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from cortex.routing.replica import Replica

MAX_ENTRIES: Final = 4096
KEPT_SECS: Final = 60.0
"""After this time the engine is asked again: another program may listen at its address."""

_Engine = tuple[str, str | None, bytes]


class MissingPaths:
    """One worker's findings. An engine is known by its address and key: a new one of ours has another of each. Times
    are monotonic seconds."""

    def __init__(self) -> None:
        self._until: OrderedDict[_Engine, float] = OrderedDict()

    def add(self, replica: Replica, path: bytes, now: float) -> None:
        """The engine has answered that it does not know the path."""
        key = replica.url, replica.api_key, path
        self._until[key] = now + KEPT_SECS
        self._until.move_to_end(key)
        if len(self._until) > MAX_ENTRIES:
            self._until.popitem(last=False)

    def forget(self, replica: Replica, path: bytes) -> None:
        """The engine may have changed."""
        self._until.pop((replica.url, replica.api_key, path), None)

    def lacks(self, replica: Replica, path: bytes, now: float) -> bool:
        return self._until.get((replica.url, replica.api_key, path), 0.0) > now
