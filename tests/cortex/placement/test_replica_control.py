"""Keeping, adding and removing replicas, and removing idle models, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, Reservation
from cortex.placement.inputs import Arrivals, Backoff, PlanningView
from cortex.placement.replicas import ReplicaChanges, ReplicaRemoval, needs_reconciliation, reconcile_replicas
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import NOW, RULES, evicted, profile, used, view

M = On(14000)


def kept(minimum: int = 1, maximum: int | None = None, **fields: Any) -> ModelProfile:
    replicas = {"min": minimum, "max": maximum if maximum is not None else max(1, minimum)}
    return profile(vram_mb=14000, replicas=replicas, **fields)


def steps(moment: PlanningView) -> ReplicaChanges:
    return reconcile_replicas(moment, moment.catalogue.models)


def loads(moment: PlanningView) -> list[tuple[str, str]]:
    return [(plan.model_id, plan.node) for plan, _ in steps(moment).loads]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"replicas": {"min": 1}}, True),
        ({"replicas": {"max": 2}}, True),
        ({"idle_ttl_secs": 60}, True),
    ],
)
def test_which_models_need_reconciliation(fields: dict[str, Any], expected: bool) -> None:
    """Models loaded only on request need no reconciliation."""
    assert needs_reconciliation(profile(**fields), fleet(host("a", 16000, models={"m": M}))) is expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (fleet(host("a", 16000, models={"m": M}), host("b", 16000, models={"m": M})), True),
        (fleet(host("a", 16000, models={"m": M}), host("b", 16000, models={"m": On(status="unloaded")})), False),
        (fleet(host("a", 16000, models={"m": M}, draining=True)), True),
        (fleet(host("a", 16000)), False),
    ],
)
def test_where_any_model_needs_reconciliation(where: FleetSnapshot, expected: bool) -> None:
    """A model loaded on several neurons may have too many replicas, and one on a drained neuron may have to move."""
    assert needs_reconciliation(profile(), where) is expected


@pytest.mark.parametrize(
    ("minimum", "where", "expected"),
    [
        (1, fleet(host("a", 16000)), "a"),
        (1, fleet(host("a", 16000, models={"m": M})), None),
        (2, fleet(host("a", 16000, models={"m": M}), host("b", 24000)), "b"),
        (2, fleet(host("a", 40000, models={"m": M})), None),  # never twice on one node
        (1, fleet(host("a", 16000, models={"m": M}, healthy=False), host("b", 24000)), "b"),  # its node died
        (1, fleet(host("a", 16000, models={"m": M}, draining=True), host("b", 24000)), "b"),  # or drains
        (1, fleet(host("a", 16000, models={"m": M}, draining=True)), None),  # nowhere to go
        (1, fleet(host("a", 16000, models={"m": On(500, status="sleeping", wants_mb=13500)})), "a"),  # woken
        (1, fleet(host("a", 16000, models={"m": On(14000, status="loading")}), host("b", 24000)), None),
        (1, fleet(host("a", 16000, models={"m": On(14000, status="loading")}, healthy=False), host("b", 24000)), "b"),
        (2, fleet(host("a", 16000), host("b", 16000), reservations=(Reservation("m", "b", (0,), 14000),)), "a"),
        (1, fleet(host("a", 16000), host("b", 16000), reservations=(Reservation("m", "b", (0,), 14000),)), None),
        (1, fleet(host("a", 12000)), None),  # too large by the figures: not tried without waiting requests
        (1, fleet(host("a", 16000, models={"m": On(status="failed")}), host("b", 24000)), "a"),
    ],
)
def test_the_minimum_is_kept(minimum: int, where: FleetSnapshot, expected: str | None) -> None:
    """Replicas are loaded wherever feasible, also after a node dies or drains."""
    assert loads(view(where, kept(minimum))) == ([] if expected is None else [("m", expected)])


@pytest.mark.parametrize(
    ("use", "priority", "expected"),
    [
        (used(), 100, {"x"}),  # evicts an idle equal
        (used(1), 100, None),  # never interrupts requests
        (used(idle=5, age=5), 100, None),  # nor evicts a model that was just loaded
        (used(), 200, None),  # nor one with a higher priority
    ],
)
def test_what_the_minimum_may_evict(use: Any, priority: int, expected: set[str] | None) -> None:
    """It evicts only idle models of equal or lower priority."""
    where = fleet(host("a", 16000, models={"x": On(14000)}))
    x = profile(id="x", vram_mb=14000, residency_priority=priority)
    found = reconcile_replicas(view(where, kept(), x, usages={("x", "a"): use}), [kept()])
    assert [evicted(plan) for plan, _ in found.loads] == ([] if expected is None else [expected])


def test_two_models_with_a_minimum_do_not_evict_each_other() -> None:
    """Among equals, the loaded model stays."""
    other = kept(id="x")
    assert steps(view(fleet(host("a", 16000, models={"x": On(14000)})), kept(), other)) == ReplicaChanges()


def test_after_a_failure_it_is_not_tried_again_at_once() -> None:
    """Reconciliation respects backoffs."""
    backoffs = {("m", "a"): Backoff(NOW + 9, "no")}
    assert loads(view(fleet(host("a", 16000)), kept(), backoffs=backoffs)) == []
    assert loads(view(fleet(host("a", 16000), host("b", 24000)), kept(), backoffs=backoffs)) == [("m", "b")]


def test_one_pass_does_not_plan_the_same_memory_twice() -> None:
    """A load started for one model counts for the next."""
    moment = view(fleet(host("a", 16000), host("b", 24000)), kept(), kept(id="x"), kept(id="y"))
    assert loads(moment) == [("m", "a"), ("x", "b")]


SCALED = kept(0, 3)


@pytest.mark.parametrize(
    ("overloaded_secs", "where", "expected"),
    [
        (6, fleet(host("a", 16000, models={"m": M}), host("b", 24000)), "b"),
        (4, fleet(host("a", 16000, models={"m": M}), host("b", 24000)), None),  # not for long enough
        (6, fleet(host("a", 16000, models={"m": M}), host("b", 24000, models={"x": On(14000)})), None),  # would evict
        (
            6,
            fleet(
                host("a", 16000, models={"m": M}),
                host("b", 16000, models={"s": On(500, status="sleeping", wants_mb=13000)}),
            ),
            None,  # nor memory that a sleeping model needs
        ),
        (6, fleet(host("a", 16000), host("b", 24000)), None),  # none serving: left to the waiting requests
        (6, fleet(*(host(name, 16000, models={"m": M}) for name in "abc"), host("d", 24000)), None),  # at the maximum
    ],
)
def test_replicas_are_added_under_pressure(overloaded_secs: float, where: FleetSnapshot, expected: str | None) -> None:
    """Replicas are added after sustained excess load, and only where no eviction is needed."""
    found = loads(view(where, SCALED, overloaded_secs={"m": overloaded_secs}))
    assert found == ([] if expected is None else [("m", expected)])


def removed(moment: PlanningView) -> list[tuple[str, bool]]:
    found = steps(moment).removals
    assert all(isinstance(each, ReplicaRemoval) for each in found)
    return [(each.node, each.sleep) for each in found]


TWO = fleet(host("a", 16000, models={"m": M}), host("b", 16000, models={"m": M}))


@pytest.mark.parametrize(
    ("model", "idle", "expected"),
    [
        (SCALED, {"a": 400, "b": 10}, ["a"]),
        (SCALED, {"a": 299, "b": 10}, []),
        (SCALED, {"a": 400, "b": 500}, ["b"]),  # longest idle first; the last one stays
        (kept(2), {"a": 400, "b": 500}, []),  # down to the minimum
        (kept(1, 2), {"a": 400, "b": 500}, ["b"]),
        (kept(0, 2, idle_ttl_secs=60), {"a": 100, "b": 30}, ["a"]),
        (kept(0, 2, idle_ttl_secs=60), {"a": 100, "b": 90}, ["a", "b"]),
        (kept(1, 2, idle_ttl_secs=60), {"a": 100, "b": 90}, ["a"]),
    ],
)
def test_idle_replicas_are_removed(model: ModelProfile, idle: dict[str, float], expected: list[str]) -> None:
    """Replicas beyond the minimum are removed, the least recently used first."""
    uses = {("m", name): used(idle=secs) for name, secs in idle.items()}
    assert [name for name, _ in removed(view(TWO, model, usages=uses))] == expected


@pytest.mark.parametrize(
    ("model", "uses", "expected"),
    [
        (kept(0), {"a": used(idle=310), "b": used(idle=2)}, ["a"]),
        (kept(0), {"a": used(idle=310), "b": used(idle=400)}, ["b"]),  # one stays
        (kept(1), {"a": used(idle=310), "b": used(idle=400)}, ["b"]),
        (kept(0), {"a": used(idle=1.1), "b": used(idle=0.5)}, ["a"]),  # both were there for long: a pause is enough
        (kept(0), {"a": used(idle=0.9), "b": used(idle=0.5)}, []),
        (kept(0), {"a": used(idle=290), "b": used(idle=0.5, age=290)}, []),  # the neuron may go down again
        (kept(0), {"a": used(idle=310), "b": used(idle=0.5, age=290)}, ["a"]),
        (kept(0), {"a": used(1, idle=900), "b": used(1, idle=900)}, []),  # both work
        (kept(0), {"a": used(20, idle=900), "b": used(idle=400)}, ["b"]),  # however much there is to do
        (kept(2), {"a": used(idle=900), "b": used(idle=900)}, []),
    ],
)
def test_replicas_above_the_maximum_are_removed(model: ModelProfile, uses: dict[str, Any], expected: list[str]) -> None:
    """After a failover the first neuron may come back with its replica."""
    moment = view(TWO, model, usages={("m", name): use for name, use in uses.items()})
    assert [name for name, _ in removed(moment)] == expected


@pytest.mark.parametrize(
    ("use", "waiting", "expected"),
    [
        (used(idle=61), {}, True),
        (used(idle=59), {}, False),
        (used(idle=900, age=30), {}, False),  # never used since its load: idle time starts there
        (used(1, idle=900), {}, False),
        (used(idle=900), {"m": 1}, False),
    ],
)
def test_idle_ttl(use: Any, waiting: dict[str, float], expected: bool) -> None:
    """A model unused for `idle_ttl_secs` is removed; by default it is unloaded."""
    where = fleet(host("a", 16000, models={"m": M}))
    moment = view(where, kept(0, idle_ttl_secs=60), usages={("m", "a"): use}, waiting=waiting)
    assert removed(moment) == ([("a", False)] if expected else [])


def test_idle_model_is_put_to_sleep() -> None:
    """`when_idle = "sleep"` puts it to sleep; a sleeping model is not removed again."""
    model = kept(0, idle_ttl_secs=60, when_idle="sleep")
    uses = {("m", "a"): used(idle=90)}
    assert removed(view(fleet(host("a", 16000, models={"m": M})), model, usages=uses)) == [("a", True)]
    asleep = fleet(host("a", 16000, models={"m": On(500, status="sleeping", wants_mb=13500)}))
    assert removed(view(asleep, model, usages=uses)) == []


def test_requests_of_other_clients_keep_a_model() -> None:
    """Requests reported by the engine count as use."""
    where = fleet(host("a", 16000, models={"m": On(14000, working=1)}))
    assert removed(view(where, kept(0, idle_ttl_secs=60), usages={("m", "a"): used(idle=900)})) == []


@pytest.mark.parametrize(("working", "expected"), [(9, []), (8, ["b"])])
def test_a_replica_that_would_be_loaded_again_stays(working: int, expected: list[str]) -> None:
    """An idle replica stays while removing it would leave the others more than `replica_target` requests each."""
    uses = {("m", "a"): used(working), ("m", "b"): used(idle=400)}
    assert [name for name, _ in removed(view(TWO, SCALED, usages=uses))] == expected


def test_a_busy_replica_is_skipped() -> None:
    """The next idle replica is removed instead."""
    uses = {("m", "a"): used(1, idle=900), ("m", "b"): used(idle=400)}
    assert [name for name, _ in removed(view(TWO, SCALED, usages=uses))] == ["b"]


@pytest.mark.parametrize(
    ("where", "idle", "expected"),
    [
        (fleet(host("a", 16000, models={"m": M}, draining=True), host("b", 24000)), 5, [("m", "b")]),
        (fleet(host("a", 16000, models={"m": M}, draining=True), host("b", 24000)), 500, []),  # not in use
        (fleet(host("a", 16000, models={"m": M}, draining=True)), 5, []),  # stays where it is
        (fleet(host("a", 16000, models={"m": M}), host("b", 24000)), 5, []),
    ],
)
def test_a_model_in_use_moves_off_a_drained_neuron(
    where: FleetSnapshot, idle: float, expected: list[tuple[str, str]]
) -> None:
    """Draining empties the neuron even under traffic: once the model is up elsewhere, requests go there."""
    moment = view(where, profile(vram_mb=14000), usages={("m", "a"): used(idle=idle)})
    assert loads(moment) == expected


def _displaced(m_per_hour: float = 10, a_per_hour: float = 1, **fields: Any) -> PlanningView:
    """`m` was evicted for `a` on the only card. Each begins so many sessions an hour."""
    arrivals = {"m": Arrivals((NOW - 600,), m_per_hour / 3600), "a": Arrivals((NOW - 500,), a_per_hour / 3600)}
    known: dict[str, Any] = {
        "usages": {("a", "box"): used(idle=500)},
        "arrivals": arrivals,
        "displaced": frozenset({"m"}),
        "m": {},
        "a": {},
        **fields,
    }
    models = (profile(id=name, vram_mb=14000, **known.pop(name)) for name in ("m", "a"))
    return view(fleet(host("box", 16000, models={"a": M})), *models, **known)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (_displaced(), True),
        (_displaced(a_per_hour=6), True),
        (_displaced(a_per_hour=7), False),  # not clearly less
        (_displaced(usages={("a", "box"): used(idle=59)}), False),
        (_displaced(usages={("a", "box"): used(1, idle=500)}), False),
        (_displaced(usages={("a", "box"): used(idle=500, age=40)}), False),  # loaded, and not used yet
        (_displaced(displaced=frozenset()), False),  # an operator or its `idle_ttl_secs` has unloaded it
        (_displaced(rules=replace(RULES, load_ahead=False)), False),
        (_displaced(m={"idle_ttl_secs": 700}), True),
        (_displaced(m={"idle_ttl_secs": 600}), False),  # it would be unloaded again
        (_displaced(a={"residency_priority": 200}), False),
        (_displaced(a={"pinned_on": ["box"]}), False),
        (_displaced(backoffs={("m", "box"): Backoff(NOW + 9, "it failed")}), False),
        (_displaced(holds={("m", "box"): NOW + 9}), False),
    ],
)
def test_which_displaced_model_comes_back_ahead_of_its_requests(moment: PlanningView, expected: bool) -> None:
    """One that is used clearly more than the idle models in its way."""
    planned = [(plan.model_id, evicted(plan)) for plan, _ in steps(moment).loads]
    assert planned == ([("m", {"a"})] if expected else [])


def test_no_model_comes_back_while_another_waits_for_memory() -> None:
    """The memory is for the model that is requested."""
    asked_for = profile(id="b", vram_mb=14000)
    moment = _displaced(waiting={"b": 1})
    moment = replace(moment, catalogue=Catalogue(models=(*moment.catalogue.models, asked_for)))
    assert not steps(moment).loads
