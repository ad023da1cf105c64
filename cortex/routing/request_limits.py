"""The limits of neurons on parallel requests, and the requests that count against them. No I/O."""

from __future__ import annotations

from collections import Counter

from cortex.routing.replica import Replica, ReplicaKey


class RequestLimits:
    """Counts the requests at replicas with a limit. The count is exact over all workers: each such request is taken
    here before it is sent, and released when it ends. Those that were sent while the replica had no limit are counted
    as of the last `count_others`."""

    def __init__(self) -> None:
        self._taken: Counter[ReplicaKey] = Counter()
        self._others: dict[ReplicaKey, int] = {}

    def has_room(self, key: ReplicaKey, limit: int | None) -> bool:
        return limit is None or self.room(key, limit) > 0

    def room(self, key: ReplicaKey, limit: int) -> int:
        """For how many more requests there is room."""
        return max(0, limit - self._taken[key] - self._others.get(key, 0))

    def count_others(self, key: ReplicaKey, in_flight: int, *, more: bool) -> None:
        """`in_flight`: all requests at the replica. `more`: it had no limit at the last call, so that there may be more
        untaken requests than then."""
        others, before = max(0, in_flight - self._taken[key]), self._others.pop(key, 0)
        left = others if more else min(others, before)
        if left:
            self._others[key] = left

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
