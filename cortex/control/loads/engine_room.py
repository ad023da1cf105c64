"""How many requests each engine gets at a time, so that the fair order of the callers decides who waits.

A neuron may limit its engines. Others queue requests by themselves, in the order of arrival: once such an engine has a
queue, requests are held back here, with a few in the engine's queue so that its batch stays full. How many an engine
works on at once is learned from the neuron's reports. Nothing is held back while there is one caller, or while no
engine of the model has had a queue for a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import Demand
from cortex.fleet.snapshot import EngineSnapshot, NodeSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import Replica, ReplicaKey
from cortex.routing.request_limits import RequestLimits
from shared.subscribers import Subscribers

FIRST_REQUESTS = 16
"""How many of the requests that waited for its load an engine gets at first."""
GROWTH = 4
"""By how much that grows with each report without a queue, until the first report with one; then by half."""
QUEUED_SHARE = 8
"""Of a batch, one in so many waits in the engine."""
LOOK_SECS = 1.0
CALM_LOOKS = 60
"""After so many looks without a queue an engine has no limit any more. Without limit, all requests of a burst would be
in its queue before the next report tells of it."""


class EngineRoom:
    """Owns the requests that count against limits. `changes` announces models whose engines have other limits now."""

    def __init__(self, *, fleet: Fleet, counts: CountTotals, queue: AdmissionQueue, demand: Demand) -> None:
        self._fleet = fleet
        self._counts = counts
        self._queue = queue
        self._demand = demand
        self._requests = RequestLimits()
        self._learned: dict[ReplicaKey, int] = {}
        self._had_queue: set[ReplicaKey] = set()
        self._calm: dict[ReplicaKey, int] = {}  # looks since an engine's last queue
        self._reports: dict[ReplicaKey, object] = {}  # the last one that was looked at
        self._limits: dict[ReplicaKey, int | None] = {}  # as of the last look
        self.changes: Subscribers[[Iterable[str]]] = Subscribers()

    def limit(self, engine: EngineSnapshot | None) -> int | None:
        """How many requests the engine may have at a time; None: any number."""
        if engine is None:
            return None
        reported, activity = engine.limit, engine.activity
        if not self._demand.several_callers:
            return reported
        has_queue = activity is not None and activity.queue_depth > 0
        if not has_queue and engine.key not in self._calm and not self._queue.count(*self._names(engine.key)):
            return reported
        learned = self._learned.get(engine.key, FIRST_REQUESTS)
        return learned if reported is None else min(learned, reported)

    def has_room(self, key: ReplicaKey, limit: int | None) -> bool:
        return self._requests.has_room(key, limit)

    def take(self, replica: Replica) -> bool:
        """As `RequestLimits.take`."""
        return self._requests.take(replica)

    def release(self, replica: Replica, count: int = 1) -> None:
        """As `RequestLimits.release`."""
        self._requests.release(replica, count)

    async def run(self) -> None:
        """Learns from the neurons' reports. Never returns."""
        while True:
            await asyncio.sleep(LOOK_SECS)
            self.look()

    def look(self) -> None:
        """Learns from the last report of every engine, and lets requests go where there is room."""
        if not self._demand.several_callers:
            return
        fleet, changed = self._fleet.snapshot(), set[str]()
        limits: dict[ReplicaKey, int | None] = {}
        for node in fleet.healthy:
            for engine in node.every_engine():
                if engine.view.servable_now:
                    self._learn(node, engine)
                    self._note_queue(engine)
                    limits[engine.key] = limit = self.limit(engine)
                    before = self._limits.get(engine.key)
                    self._requests.count_others(
                        engine.key, self._counts.in_flight(engine.key), more=limit is not None and before is None
                    )
                    if limit != before:
                        changed.add(engine.key.model_id)
                    self._let_go(engine.key, limit)
        for key in [key for key in self._reports if fleet.engine(key) is None]:
            self._forget(key)
        self._limits = limits
        if changed:
            self.changes.announce(changed)

    def _learn(self, node: NodeSnapshot, engine: EngineSnapshot) -> None:
        key, activity = engine.key, engine.activity
        if self._reports.get(key) is node.health:
            return
        self._reports[key] = node.health
        limit = self._learned.get(key, FIRST_REQUESTS)
        if activity is not None and activity.queue_depth:
            # Not less the requests of others: the report is older than our counts, so that they cannot be told apart.
            self._learned[key] = activity.in_flight + _queued(activity.in_flight)
            self._had_queue.add(key)
        elif self._queue.count(*self._names(key)) and (
            activity is None or activity.in_flight >= limit - _queued(limit)
        ):
            self._learned[key] = limit + max(1, limit // 2) if key in self._had_queue else limit * GROWTH

    def _note_queue(self, engine: EngineSnapshot) -> None:
        if engine.activity is not None and engine.activity.queue_depth > 0:
            self._calm[engine.key] = 0
        elif engine.key in self._calm:
            self._calm[engine.key] += 1
            if self._calm[engine.key] > CALM_LOOKS:
                del self._calm[engine.key]

    def _forget(self, key: ReplicaKey) -> None:
        """Its neuron no longer lists the engine."""
        del self._reports[key]
        self._learned.pop(key, None)
        self._had_queue.discard(key)
        self._calm.pop(key, None)
        self._requests.count_others(key, 0, more=False)

    def _let_go(self, key: ReplicaKey, limit: int | None) -> None:
        """Wakes as many waiting requests as the engine has room for."""
        names = self._names(key)
        waiting = self._queue.count(*names)
        room = waiting if limit is None else min(waiting, self._requests.room(key, limit))
        self._queue.notify_first(*names, count=room)

    def _names(self, key: ReplicaKey) -> tuple[str, ...]:
        return self._fleet.snapshot().names_for(key)


def _queued(running: int) -> int:
    """How many requests wait in an engine that works on so many."""
    return max(1, running // QUEUED_SHARE)
