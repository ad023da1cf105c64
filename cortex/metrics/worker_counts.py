"""The sums over all workers, in the control process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol

import msgspec

from cortex.accounts.caller import PEOPLE
from cortex.metrics.counters import Counters, merged
from cortex.metrics.in_flight import CallerAt, CallerCount
from cortex.routing.replica import ReplicaKey


class WorkerCounts(Protocol):
    """One worker's counts, live or as last reported."""

    def collect(self, *, callers: bool = False) -> Counters:
        """Everything counted since the worker began; what it counted by API key only with `callers`."""

    def in_flight_here(self) -> Mapping[ReplicaKey, int]: ...

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        """Requests that were sent to an engine since the worker began."""

    def take_callers(self) -> Mapping[CallerAt, CallerCount]:
        """By API key, the requests in flight, and those begun since the last call. Without requests that have none."""

    async def refresh(self, *, callers: bool = False) -> None:
        """Brings the counts up to date, with `callers` also those by API key."""


class CountTotals:
    """Sums over the workers. What a worker counted remains after it exits, for each key until that is gone."""

    def __init__(self) -> None:
        self.workers: list[WorkerCounts] = []
        self._ended = Counters()

    def attach(self, worker: WorkerCounts) -> None:
        self.workers.append(worker)

    def detach(self, worker: WorkerCounts) -> None:
        self.workers.remove(worker)
        self._ended = merged([self._ended, worker.collect(callers=True)])

    def keep_callers(self, names: AbstractSet[str]) -> None:
        """Forgets what workers that have exited counted for keys with other names: they are gone."""
        for name in self._ended.callers.keys() - names - {PEOPLE}:
            del self._ended.callers[name]

    async def refresh(self, *, callers: bool = False) -> None:
        await asyncio.gather(*(worker.refresh(callers=callers) for worker in self.workers))

    def counters(self, *, callers: bool = False) -> list[Counters]:
        ended = self._ended if callers else msgspec.structs.replace(self._ended, callers={})
        return [ended, *(worker.collect(callers=callers) for worker in self.workers)]

    def in_flight(self, key: ReplicaKey) -> int:
        return sum(worker.in_flight_here().get(key, 0) for worker in self.workers)

    def begun(self) -> dict[ReplicaKey, int]:
        """Requests sent to engines. Drops when a worker exits, because its last requests are unknown."""
        total: dict[ReplicaKey, int] = {}
        for worker in self.workers:
            for key, count in worker.begun_here().items():
                total[key] = total.get(key, 0) + count
        return total

    def take_callers(self) -> dict[CallerAt, CallerCount]:
        """The requests of each API key: in flight, and begun since the last call. The last ones of a worker that has
        exited are unknown."""
        total: dict[CallerAt, CallerCount] = {}
        for worker in self.workers:
            for at, count in worker.take_callers().items():
                before = total.get(at)
                total[at] = count if before is None else CallerCount(before.now + count.now, before.begun + count.begun)
        return total

    def all_in_flight(self) -> dict[ReplicaKey, int]:
        """Without zeros."""
        total: dict[ReplicaKey, int] = {}
        for worker in self.workers:
            for key, count in worker.in_flight_here().items():
                total[key] = total.get(key, 0) + count
        return total

    def in_flight_beside(self, worker: WorkerCounts) -> dict[ReplicaKey, int]:
        """The requests of all other workers."""
        total: dict[ReplicaKey, int] = {}
        for other in self.workers:
            if other is not worker:
                for key, count in other.in_flight_here().items():
                    total[key] = total.get(key, 0) + count
        return total
