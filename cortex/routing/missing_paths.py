"""Which engines lack a path, so that requests to it are translated at once. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from cortex.routing.replica import Replica

MAX_ENTRIES: Final = 4096
KEPT_SECS: Final = 60.0
"""After this time the engine is asked again: another program may listen at its address."""

_Key = tuple[str, str, str | None, bytes]


class MissingPaths:
    """One worker's findings. An engine is known by its model, address and key. Another one at the same address is
    noticed when the caller forgets it, after a failure or a load, or after KEPT_SECS. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._until: OrderedDict[_Key, float] = OrderedDict()

    def add(self, replica: Replica, path: bytes, now: float) -> None:
        """The engine has answered that it does not know the path."""
        key = _key(replica, path)
        self._until[key] = now + KEPT_SECS
        self._until.move_to_end(key)
        if len(self._until) > MAX_ENTRIES:
            self._until.popitem(last=False)

    def forget(self, replica: Replica, path: bytes) -> None:
        """The engine may have changed."""
        self._until.pop(_key(replica, path), None)

    def lacks(self, replica: Replica, path: bytes, now: float) -> bool:
        """By its neuron's word, or by its own answer."""
        if replica.missing_paths and path.decode("latin-1") in replica.missing_paths:
            return True
        return self._until.get(_key(replica, path), 0.0) > now


def _key(replica: Replica, path: bytes) -> _Key:
    return replica.model_id, replica.url, replica.api_key, path
