"""The limits of neurons on parallel requests, and the requests that count against them. No I/O."""

from __future__ import annotations

from collections import Counter

from cortex.routing.replica import Replica, ReplicaKey


class RequestLimits:
    """Counts the requests at replicas with a limit. The count is exact over all workers: each such request is taken
    here before it is sent, and released when it ends."""

    def __init__(self) -> None:
        self._taken: Counter[ReplicaKey] = Counter()

    def has_room(self, key: ReplicaKey, limit: int | None) -> bool:
        return limit is None or self._taken[key] < limit

    def take(self, replica: Replica) -> bool:
        """Counts one more request there; False if that exceeds the limit."""
        if not self.has_room(replica.key, replica.limit):
            return False
        if replica.limit is not None:
            self._taken[replica.key] += 1
        return True

    def release(self, replica: Replica, count: int = 1) -> None:
        """Requests that were taken for this replica have ended."""
        self._taken[replica.key] -= count
        if not self._taken[replica.key]:
            del self._taken[replica.key]
