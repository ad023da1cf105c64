"""Demand from the workers' counts: when a model was last used, and how often it is requested."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.accounts.fairness.device_time import DeviceTime
from cortex.config.catalogue import Catalogue
from cortex.control.demand import LOAD_AHEAD_SECS, REPORT_AGE_SECS, Demand
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, by_instance
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import CallerAt, CallerCount, InFlight
from cortex.metrics.worker_counts import CountTotals
from cortex.placement.inputs import MAX_ARRIVALS, PlanningView, ReplicaUsage
from cortex.routing.replica import ReplicaKey
from shared.protocol import ModelActivity, ModelView, NeuronHealth
from tests.cortex.fleets import On, fleet, host, replica_key

KEY = replica_key("m", "a")
BOTH = Catalogue.model_validate({"models": [{"id": "m"}, {"id": "other"}]})
FLEET = fleet(host("a", 24000, models={"m": On(9000)}))


class Worker:
    """A worker's counts, by hand."""

    def __init__(self) -> None:
        self.in_flight = InFlight()

    def collect(self, *, callers: bool = False) -> Counters:
        return Counters()

    def in_flight_here(self) -> Mapping[ReplicaKey, int]:
        return self.in_flight.here

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        return self.in_flight.begun

    def take_callers(self) -> Mapping[CallerAt, CallerCount]:
        return self.in_flight.take_callers()

    async def refresh(self, *, callers: bool = False) -> None: ...

    def serve(self, *, times: int = 1) -> None:
        """Requests that come and go."""
        for _ in range(times):
            self.in_flight.add(KEY)
            self.in_flight.remove(KEY)


class Moment:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Moment:
    return Moment()


@pytest.fixture
def counts() -> CountTotals:
    return CountTotals()


@pytest.fixture
def demand(counts: CountTotals, clock: Moment) -> Demand:
    demand = Demand(counts, clock)
    demand.routes_changed(["m"], FLEET)
    return demand


def sample(demand: Demand) -> None:
    demand.sample(FLEET, replica_target=8)


def attached(counts: CountTotals) -> Worker:
    worker = Worker()
    counts.attach(worker)
    return worker


def test_a_request_between_two_samples_is_counted(demand: Demand, counts: CountTotals, clock: Moment) -> None:
    """A model that was used half a second ago is not idle."""
    worker = attached(counts)
    sample(demand)
    clock.now += 0.5
    worker.serve()
    assert demand.usages()[KEY].last_used == clock.now
    assert demand.usages()[KEY].in_flight == 0


def test_the_last_use_of_a_model_in_unix_time(demand: Demand, counts: CountTotals, clock: Moment) -> None:
    """The later one of its engines."""
    assert demand.last_uses() == {}
    demand.record_use(replica_key("m", "b"))
    clock.now += 100
    demand.record_use(KEY)
    first = demand.last_uses()["m"]
    clock.now += 5000
    assert first - demand.last_uses()["m"] == pytest.approx(5000, abs=600)


def test_each_request_is_counted_once_over_many_samples(demand: Demand, counts: CountTotals, clock: Moment) -> None:
    worker = attached(counts)
    for _ in range(3):
        clock.now += 1
        worker.serve(times=2)
        demand.usages()
        sample(demand)
    assert demand.arrivals()["m"].times == (1001, 1001, 1002, 1002, 1003, 1003)


def test_a_request_that_waited_arrived_when_it_began_to_wait(
    demand: Demand, counts: CountTotals, clock: Moment
) -> None:
    """It does not count again when it begins: a load that serves ten waiting requests is not a burst of ten."""
    worker = attached(counts)
    demand.record_request("m")
    clock.now += 40
    demand.record_admission("m")
    worker.serve()
    sample(demand)
    assert demand.arrivals()["m"].times == (1000,)
    clock.now += 10
    worker.serve()
    sample(demand)
    assert demand.arrivals()["m"].times == (1000, 1050)


def test_only_the_last_arrivals_are_kept(demand: Demand, counts: CountTotals, clock: Moment) -> None:
    demand.record_request("m", 5)
    clock.now += 1
    demand.record_request("m", 10 * MAX_ARRIVALS)
    assert demand.arrivals()["m"].times == (1001,) * MAX_ARRIVALS


def test_demand_survives_the_exit_of_a_worker(demand: Demand, counts: CountTotals, clock: Moment) -> None:
    """Counts of the worker that replaces it are added in full."""
    old, other = attached(counts), attached(counts)
    old.serve(times=5)
    sample(demand)
    counts.detach(old)
    sample(demand)
    attached(counts).serve(times=3)
    other.serve()
    sample(demand)
    assert len(demand.arrivals()["m"].times) == 9


def test_a_load_is_as_old_as_the_status(demand: Demand, clock: Moment) -> None:
    """It starts from zero if the model was unloaded from that node meanwhile."""
    began, other = clock.now, replica_key("m", "b")
    clock.now += 5
    here, there = host("a", 24000, models={"m": On(9000)}), host("b", 24000, models={"m": On(9000)})
    demand.routes_changed(["m"], fleet(here, there))
    assert {key: use.loaded_at for key, use in demand.usages().items()} == {
        KEY: began,
        other: began + 5,
    }
    demand.routes_changed(["m"], fleet(there))
    clock.now += 5
    demand.routes_changed(["m"], fleet(here, there))
    assert {key: use.loaded_at for key, use in demand.usages().items()} == {
        KEY: began + 10,
        other: began + 5,
    }


def test_a_replica_on_a_neuron_that_was_down_is_new(demand: Demand, clock: Moment) -> None:
    """Its idle time starts when the neuron is back."""
    clock.now += 5
    demand.routes_changed(["m"], fleet(host("a", 24000, models={"m": On(9000)}, healthy=False)))
    assert demand.usages() == {}
    demand.routes_changed(["m"], FLEET)
    assert demand.usages()[KEY].loaded_at == clock.now


def reported(**activity: int | None) -> FleetSnapshot:
    health = NeuronHealth(models=[ModelActivity(id="m", **activity)])
    models = by_instance([ModelView(id="m", status="loaded")])
    return FleetSnapshot({"n": NodeSnapshot("n", "http://n", healthy=True, health=health, models=models)})


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [
        ({"ended": 4}, {"ended": 4}, False),
        ({"ended": 4}, {"ended": 5}, True),  # begun and ended between two polls, by another cortex
        ({"ended": 4}, {"ended": 0}, False),  # the engine started again
        ({"ended": None}, {"ended": None}, False),  # a neuron that does not tell
        ({"ended": 4}, {"ended": 4, "in_flight": 1}, True),
        ({"ended": 4}, {"ended": 4, "queue_depth": 1}, True),
    ],
)
def test_requests_reported_by_engines_count_as_use(
    before: dict[str, int | None], after: dict[str, int | None], used: bool
) -> None:
    """No cortex considers a model idle while another one sends requests to it."""
    now = 100.0
    demand = Demand(CountTotals(), clock=lambda: now)
    demand.routes_changed(["m"], reported(**before))
    demand.sample(reported(**before), replica_target=8)
    now = 200.0
    demand.sample(reported(**after), replica_target=8)
    assert (demand.usages()[replica_key("m", "n")].last_used == 200.0) is used


def test_own_requests_in_an_old_report_do_not_count_as_use(counts: CountTotals, clock: Moment) -> None:
    """A report that still shows our last request, or counts it only now, does not make the model look busy."""
    demand, worker, key = Demand(counts, clock), Worker(), replica_key("m", "n")
    counts.attach(worker)
    demand.routes_changed(["m"], reported())
    demand.sample(reported(ended=0), replica_target=8)
    for report in (reported(ended=0, in_flight=1), reported(ended=1)):
        worker.in_flight.add(key)
        worker.in_flight.remove(key)
        used_at = clock.now
        assert demand.usages()[key].last_used == used_at
        clock.now += 1
        demand.sample(report, replica_target=8)
        use = demand.usages()[key]
        assert use.last_used == used_at
        assert requests_on(use, report) == 0
    # Neither hides the requests of others for long.
    assert requests_on(demand.usages()[key], reported(in_flight=3)) == 2
    demand.sample(reported(ended=3), replica_target=8)
    assert demand.usages()[key].last_used == clock.now
    clock.now += REPORT_AGE_SECS + 1
    assert requests_on(demand.usages()[key], reported(ended=1, in_flight=1)) == 1


def requests_on(use: ReplicaUsage, report: FleetSnapshot) -> int:
    """As the planner counts them."""
    key = replica_key("m", "n")
    engine = report.engine(key)
    assert engine is not None
    return PlanningView(now=0, catalogue=Catalogue(), fleet=report, usages={key: use}).requests_on(engine)


def test_sessions_begin_with_a_request_after_a_pause(demand: Demand, clock: Moment) -> None:
    """A pause of a minute ends a session. Sessions fade over hours."""
    for _ in range(10):
        for _ in range(5):
            demand.record_request("m")
            clock.now += 59
        clock.now += 365 - 59
    hourly = demand.arrivals()["m"].sessions_per_sec * 3600
    assert 5 < hourly < 6.6  # ten in 6010 s; no more than six an hour can be told from so short a time
    clock.now += 12 * 3600
    assert demand.arrivals()["m"].sessions_per_sec * 3600 < 0.02


NEWCOMER = replica_key("n", "a")


def test_who_displaced_a_model_is_known_until_it_is_loaded(demand: Demand) -> None:
    """A model that displaces others instead passes its displacer on. One that is evicted in turn by a model that it had
    displaced has only itself to wait for."""
    second = replica_key("m", "b")
    demand.record_displaced(["m"], NEWCOMER)
    demand.record_displaced(["other"], second)
    assert demand.displaced_by == {"m": NEWCOMER, "other": NEWCOMER}
    demand.record_displaced(["n"], second)
    assert demand.displaced_by["n"] == NEWCOMER
    demand.routes_changed(["m"], fleet(host("a", 24000)))
    demand.routes_changed(["m"], fleet(host("a", 24000, models={"m": On(9000)})))
    assert demand.displaced_by == {"other": NEWCOMER, "n": NEWCOMER}


def test_engines_on_one_device_share_what_they_pay(counts: CountTotals, clock: Moment) -> None:
    """By what they have booked there; an engine that has a device of its own pays for all of it."""
    device_time = DeviceTime(lambda: 1e12)
    demand, worker = Demand(counts, clock, device_time=device_time), attached(counts)
    for key_id, key in (("a", KEY), ("b", replica_key("other", "a")), ("c", replica_key("m", "b"))):
        worker.in_flight.add(key, key_id)
    there = fleet(
        host("a", 24000, models={"m": On(15000), "other": On(5000)}), host("b", 24000, models={"m": On(5000)})
    )
    demand.charge(there, {})
    clock.now += 4
    demand.charge(there, {})
    assert demand.accounts == pytest.approx({"a": 3, "b": 1, "c": 4})


def test_a_displaced_model_is_one_until_it_is_loaded_or_removed(demand: Demand, clock: Moment) -> None:
    """The end of its eviction changes nothing, an operator's unload does."""
    there = fleet(host("a", 24000, models={"m": On(9000)}))
    demand.routes_changed(["m"], there)
    demand.record_displaced(["m", "other"], NEWCOMER)
    demand.routes_changed(["m"], there)  # it drains
    demand.routes_changed(["m"], fleet(host("a", 24000)))
    assert demand.displaced_if_due(BOTH) == {"m", "other"}
    assert not demand.displaced_if_due(BOTH)  # not again at once
    demand.routes_changed(["m"], there)
    clock.now += LOAD_AHEAD_SECS
    assert demand.displaced_if_due(BOTH) == {"other"}
    demand.record_removed("other")
    clock.now += LOAD_AHEAD_SECS
    assert not demand.displaced_if_due(BOTH)


def test_a_displaced_model_that_left_the_catalogue_is_forgotten(demand: Demand, clock: Moment) -> None:
    """Also when it comes back: it may be another one."""
    one = Catalogue.model_validate({"models": [{"id": "m"}]})
    demand.record_displaced(["m", "other"], NEWCOMER)
    assert demand.displaced_if_due(one) == {"m"}
    clock.now += LOAD_AHEAD_SECS
    assert demand.displaced_if_due(BOTH) == {"m"}
