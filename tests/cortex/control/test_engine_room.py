"""How many requests an engine gets at a time when several keys use it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import cast

from cortex.accounts.caller import Caller
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.control.admission_queue import AdmissionQueue, Ticket
from cortex.control.demand import Demand
from cortex.control.loads.engine_room import CALM_LOOKS, FIRST_REQUESTS, EngineRoom
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.worker_counts import CountTotals
from shared.protocol import ModelActivity
from tests.cortex.control.test_demand import FLEET, KEY, Worker
from tests.cortex.fleets import replica

A, B = Caller("a", "a"), Caller("b", "b")


class Engine:
    """One engine that works on `batch` requests at a time, its neuron, and those that wait at cortex for it."""

    def __init__(self, batch: int, *callers: Caller) -> None:
        self.batch = batch
        self.worker = Worker()
        self.taken = 0
        self.snapshot_now: FleetSnapshot = FLEET
        counts = CountTotals()
        counts.attach(self.worker)
        self.queue = AdmissionQueue(live=LiveConfig(CortexConfig(), Catalogue()))
        self.demand = Demand(counts)
        for caller in callers:
            self.demand.record_waiting("m", caller)
        self.room = EngineRoom(fleet=cast(Fleet, self), counts=counts, queue=self.queue, demand=self.demand)
        self.tickets = contextlib.ExitStack()

    def snapshot(self) -> FleetSnapshot:
        """As `Fleet.snapshot`."""
        return self.snapshot_now

    @property
    def at_work(self) -> int:
        return self.worker.in_flight.here.get(KEY, 0)

    @property
    def limit(self) -> int | None:
        return self.room.limit(self.snapshot_now.engine(KEY))

    def wait(self, caller: Caller, count: int = 1) -> list[Ticket]:
        return [self.tickets.enter_context(self.queue.ticket("m", lambda _: 1.0, caller)) for _ in range(count)]

    def send(self) -> bool:
        """Sends a request, if the engine may have it, as the resolver does."""
        if not self.room.take(replica("m", "a", "http://e", limit=self.limit)):
            return False
        self.worker.in_flight.add(KEY)
        return True

    def report(self, *, ended: int = 0) -> None:
        """A new report of the neuron, and a look at it when so many more requests have ended."""
        running = min(self.batch, self.at_work)
        (node,) = self.snapshot_now.nodes.values()
        assert node.health is not None
        activity = ModelActivity(id="m", in_flight=running, queue_depth=self.at_work - running)
        health = node.health.model_copy(update={"models": [activity]})
        self.snapshot_now = replace(FLEET, nodes={"a": replace(node, health=health)})
        for _ in range(ended):
            self.worker.in_flight.remove(KEY)
        self.room.look()

    def fill(self) -> None:
        while self.send():
            pass


def test_an_engine_without_a_queue_gets_everything() -> None:
    """As long as no request waits."""
    engine = Engine(100, A, B)
    for _ in range(50):
        assert engine.send()
    engine.report()
    assert engine.limit is None


def test_a_queue_in_the_engine_is_kept_short_and_its_batch_full() -> None:
    """Of requests that were sent before its queue was known, none is followed by another until it is short."""
    engine = Engine(16, A, B)
    for _ in range(40):
        assert engine.send()
    engine.report()
    assert engine.limit == 18
    assert not engine.send()
    for _ in range(30):
        engine.worker.in_flight.remove(KEY)
    engine.report()
    waiting = engine.wait(A, 20)
    engine.report()
    engine.fill()
    assert engine.at_work == 18
    assert sum(ticket.notified for ticket in waiting) >= 8


def test_the_next_burst_after_a_queue_is_held_back_from_its_first_request_on() -> None:
    """Without a limit all of it would be in the engine, ahead of everyone, before a report tells of the queue. After a
    minute without a queue workers send by themselves again."""
    engine = Engine(16, A, B)
    for _ in range(40):
        assert engine.send()
    engine.report()
    for _ in range(40):
        engine.worker.in_flight.remove(KEY)
    for _ in range(CALM_LOOKS):
        engine.report()
        assert engine.limit == 18
    engine.fill()
    assert engine.at_work == 18
    for _ in range(18):
        engine.worker.in_flight.remove(KEY)
    engine.report()
    assert engine.limit is None


def test_what_an_engine_works_on_is_learned_from_its_reports() -> None:
    """After a load it gets a few, then more with each report without a queue."""
    engine = Engine(100, A, B)
    _ = engine.wait(A, 500)
    seen = []
    for _ in range(6):
        engine.fill()
        seen.append(engine.at_work)
        engine.report()
    assert seen[0] == FIRST_REQUESTS
    assert seen[1] == 4 * FIRST_REQUESTS
    assert engine.limit == 112
    assert engine.at_work >= engine.batch


def test_a_report_that_is_older_than_our_counts_keeps_the_batch_full() -> None:
    """Requests that ended since then are not those of another cortex."""
    engine = Engine(16, A, B)
    for _ in range(100):
        assert engine.send()
    _ = engine.wait(A, 20)
    engine.report(ended=40)
    assert engine.limit == 18


def test_an_old_report_teaches_nothing_twice() -> None:
    engine = Engine(100, A, B)
    _ = engine.wait(A, 500)
    engine.fill()
    engine.report()
    limit = engine.limit
    for _ in range(5):
        engine.room.look()
    assert engine.limit == limit


def test_an_engine_that_comes_back_begins_with_a_few_requests() -> None:
    """What is learned of an engine is forgotten once its neuron does not list it any more."""
    engine = Engine(100, A, B)
    _ = engine.wait(A, 500)
    for _ in range(3):
        engine.fill()
        engine.report()
    assert engine.limit != FIRST_REQUESTS
    engine.snapshot_now = replace(FLEET, nodes={})
    engine.room.look()
    engine.snapshot_now = FLEET
    assert engine.limit == FIRST_REQUESTS


def test_one_caller_is_never_held_back() -> None:
    """With one key or none: engines queue by themselves, as before."""
    for callers in ((), (A,)):
        engine = Engine(2, *callers)
        _ = engine.wait(A, 3)
        for _ in range(40):
            assert engine.send()
        engine.report()
        assert engine.limit is None
        assert engine.send()


def test_the_key_with_one_request_gets_the_next_place() -> None:
    """Of those that are held back."""
    engine = Engine(4, A, B)
    many = engine.wait(A, 30)
    (one,) = engine.wait(B)
    engine.queue.notify_first("m", count=2)
    assert one.notified
    assert sum(ticket.notified for ticket in many) == 1
