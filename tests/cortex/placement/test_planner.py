"""Where models go, case by case."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, Reservation
from cortex.placement.fair_queue import after_start
from cortex.placement.feasibility import infeasible_reason, is_feasible
from cortex.placement.inputs import Backoff, PlanningView
from cortex.placement.load_plan import Fit
from cortex.placement.planner import all_verdicts, best_plan, evaluate_node
from tests.cortex.fleets import BEAST, BENJY, QUADBRAT, SEED_FLEET, On, fleet, host, node, with_entry
from tests.cortex.views import NOW, evicted, plan_for, planned, profile, used, view


@pytest.mark.parametrize(
    ("fields", "where", "feasible"),
    [
        ({}, QUADBRAT, True),
        ({"pinned_on": ["beast"]}, BEAST, True),
        ({"pinned_on": ["beast"]}, BENJY, False),
        ({"harness": "sim"}, BENJY, False),
        ({"min_devices": 2}, BEAST, True),
        ({"min_devices": 2}, BENJY, False),
        ({"min_devices": 2}, node("n", 32000, 32000, lost=(1,)), False),
        ({"min_devices": 2}, node("n", 32000, 32000, mig=(1,)), False),
        ({"min_device_vram_mb": 16000}, BENJY, True),
        ({"min_device_vram_mb": 16000}, QUADBRAT, False),
        ({"min_devices": 2, "min_device_vram_mb": 20000}, node("n", 24000, 12000), False),
        ({"min_devices": 2, "min_device_vram_mb": 20000}, node("n", 24000, 12000, 24000), True),
        ({"vram_mb": 10**6}, QUADBRAT, True),  # an estimate never rules out
        ({}, node("empty"), False),
    ],
)
def test_feasibility(fields: dict[str, Any], where: NodeSnapshot, feasible: bool) -> None:
    """Each documented rule alone; an infeasible node always gives a reason."""
    assert is_feasible(profile(**fields), where) is feasible
    assert (infeasible_reason(profile(**fields), where) is None) is feasible


def test_a_node_never_reached_is_neither_feasible_nor_ruled_out() -> None:
    """It may turn out to hold the model: unknown does not mean infeasible."""
    unknown = node("n", discovered=False)
    assert infeasible_reason(profile(), unknown) is None
    assert not is_feasible(profile(), unknown)


def test_a_model_is_not_loaded_where_it_is_being_drained() -> None:
    """Another cortex is draining it: a load would wait for its last request, however long that takes."""
    known, other, wanted = (
        host("a", 24000, models={"m": On(status="unloaded")}),
        host("b", 24000),
        profile(vram_mb=8000),
    )
    assert plan_for(view(fleet(known, other), wanted)).node == "a"
    drained = with_entry(known, known.views[0].model_copy(update={"state": "draining"}))
    assert plan_for(view(fleet(drained, other), wanted)).node == "b"
    verdict = evaluate_node(view(fleet(drained)), wanted, drained)
    assert (verdict.plan, verdict.temporary) == (None, True)


FULL_BENJY = host("benjy", 24564, models={"a": On(23000)})


@pytest.mark.parametrize(
    ("fields", "where", "expected"),
    [
        ({"vram_mb": 54000, "min_devices": 2, "min_device_vram_mb": 24000}, SEED_FLEET, "beast"),
        ({"vram_mb": 14000, "min_device_vram_mb": 16000}, SEED_FLEET, "benjy"),  # tightest, not largest
        ({"vram_mb": 4000}, SEED_FLEET, "quadbrat"),
        ({}, SEED_FLEET, "beast"),  # unknown size: most free memory
        ({"vram_mb": 14000}, fleet(BEAST, FULL_BENJY), "beast"),  # fits now beats fits after eviction_plan
        ({"vram_mb": 14000}, fleet(FULL_BENJY, QUADBRAT), "benjy"),  # fits after eviction_plan beats infeasible
        ({"vram_mb": 14000, "pinned_on": ["benjy"]}, fleet(BEAST, FULL_BENJY), "benjy"),  # pinned beats everything
        ({"vram_mb": 14000}, fleet(node("b", 16000), node("a", 16000)), "a"),  # ties by name
        ({"vram_mb": 4000}, fleet(node("a", 16000, draining=True), BEAST), "beast"),
        ({"vram_mb": 4000}, fleet(node("a", 16000, healthy=False), BEAST), "beast"),
        ({"vram_mb": 4000}, fleet(node("a", 16000, discovered=False), BEAST), "beast"),
        ({"min_devices": 8}, SEED_FLEET, None),
        # equally tight: the better connected
        ({"vram_mb": 20000, "min_devices": 2}, fleet(host("a", 12000, 24000), host("b", 18000, 18000)), "b"),
        # the node that knows it loads it faster, even if less tight
        ({"vram_mb": 4000}, fleet(host("a", 12000), host("b", 24000, models={"m": On(status="unloaded")})), "b"),
        ({"vram_mb": 4000}, fleet(host("a", 12000), host("b", 24000, models={"m": On(status="failed")})), "a"),
        ({"vram_mb": 4000}, fleet(host("a", 12000), host("b", 24000, models={"m": On(status="what?")})), "a"),
        # but not back to a full neuron while another has room
        (
            {"vram_mb": 14000},
            fleet(host("a", 24000, models={"x": On(23000), "m": On(status="unloaded")}), host("b", 40000)),
            "b",
        ),
        # both full: the node that knows it, else the least left over
        (
            {"vram_mb": 14000},
            fleet(
                host("a", 16000, models={"x": On(15000)}),
                host("b", 24000, models={"y": On(15000), "m": On(status="unloaded")}),
            ),
            "b",
        ),
        (
            {"vram_mb": 14000},
            fleet(host("a", 24000, models={"x": On(15000)}), host("b", 16000, models={"y": On(15000)})),
            "b",
        ),
    ],
)
def test_choice_of_node(fields: dict[str, Any], where: FleetSnapshot, expected: str | None) -> None:
    """Pinned, fits now, fits after eviction_plan, known there, tightest fit, topology, name."""
    found = planned(view(where, profile(**fields)))
    assert (found and found.node) == expected


@pytest.mark.parametrize(
    ("where", "usages", "expected"),
    [
        # waking beats free memory, however tight the fit
        (fleet(host("a", 24000, models={"m": On(500, status="sleeping", wants_mb=8000)}), host("b", 9000)), {}, "a"),
        # free memory beats sleepers' memory, which beats evicting
        (fleet(host("a", 9000, models={"s": On(500, status="sleeping", wants_mb=8000)}), host("b", 24000)), {}, "b"),
        (
            fleet(
                host("a", 9000, models={"s": On(500, status="sleeping", wants_mb=8000)}),
                host("b", 9000, models={"x": On(8000)}),
            ),
            {},
            "a",
        ),
        # idle before busy, busy before young
        (
            fleet(host("a", 9000, models={"x": On(8000)}), host("b", 9000, models={"y": On(8000)})),
            {("x", "a"): used(1), ("y", "b"): used()},
            "b",
        ),
        (
            fleet(host("a", 9000, models={"x": On(8000)}), host("b", 9000, models={"y": On(8000)})),
            {("x", "a"): used(1), ("y", "b"): used(idle=10, age=10)},
            "a",
        ),
        # and all of these before one that does not fit by the figures
        (
            fleet(host("a", 9000, foreign_mb=(8000,)), host("b", 9000, models={"y": On(8000)})),
            {("y", "b"): used(1, idle=0, age=1)},
            "b",
        ),
    ],
)
def test_order_of_fits(where: FleetSnapshot, usages: Any, expected: str) -> None:
    """Waking, free memory, memory of sleepers, evictions (idle, busy, young), trying despite the figures."""
    assert plan_for(view(where, profile(vram_mb=8000), usages=usages)).node == expected


def test_loads_in_progress_count() -> None:
    """Two models that each fit alone are not both placed where only one fits."""
    reserved = (Reservation("other", "benjy", (0,), 14000),)
    assert plan_for(view(fleet(BENJY, BEAST, reservations=reserved), profile(vram_mb=14000))).node == "beast"


@pytest.mark.parametrize("protocol_v1", [False, True])
def test_memory_booked_for_our_load_is_not_counted_twice(protocol_v1: bool) -> None:
    """While a load is under way, the rest of its device stays available."""
    loading = host("n", 24000, models={"other": On(16000, status="loading")}, protocol_v1=protocol_v1)
    if not protocol_v1:  # booked at once, used gradually
        loading = with_entry(loading, loading.views[0].model_copy(update={"vram_used_mb": 3000}))
    where = fleet(loading, reservations=(Reservation("other", "n", (0,), 16000),))
    plan = plan_for(view(where, profile(vram_mb=7000)))
    assert (plan.fit, plan.spare_mb) == (Fit.NOW, 1000)
    assert planned(view(where, profile(vram_mb=9000))) is None  # waits for the load to end


@pytest.mark.parametrize("counted_mb", [16000, 0])
def test_memory_booked_since_the_last_poll_is_not_free(counted_mb: int) -> None:
    """A neuron reports a load at once but its memory only when polled: the figures may predate the load."""
    loading = host("n", 40000, models={"other": On(16000, status="loading")})
    assert loading.health is not None
    [device] = loading.health.devices
    figures = device.model_copy(update={"vram_booked_mb": counted_mb, "vram_bookable_mb": 40000 - counted_mb})
    loading = replace(loading, health=loading.health.model_copy(update={"devices": [figures]}))
    where = fleet(loading, reservations=(Reservation("other", "n", (0,), 16000),))
    assert plan_for(view(where, profile(vram_mb=20000))).spare_mb == 4000
    assert planned(view(where, profile(vram_mb=30000))) is None


def test_a_load_that_the_neuron_does_not_report_yet() -> None:
    """The whole of its memory counts as taken."""
    where = fleet(host("n", 24000), reservations=(Reservation("other", "n", (0,), 16000),))
    assert plan_for(view(where, profile(vram_mb=7000))).spare_mb == 1000
    found = evaluate_node(view(where, profile(vram_mb=9000)), profile(vram_mb=9000), where.nodes["n"])
    assert (found.plan, found.temporary) == (None, True)
    assert "waiting for other" in found.reason


def test_reserved_memory_is_not_free() -> None:
    """Engines may not have taken their memory yet: what the node reports as bookable counts, not what it measures."""
    where = node("n", 24000, 24000, free_mb=(23000, 24000))
    assert where.health is not None
    first, second = where.health.devices
    health = [first.model_copy(update={"vram_bookable_mb": 4000}), second]
    where = replace(where, health=where.health.model_copy(update={"devices": health}))
    for devices, vram_mb in (((0,), 3000), ((1,), 8000)):
        plan = plan_for(view(fleet(where), profile(vram_mb=vram_mb)))
        assert (plan.devices, plan.fit) == (devices, Fit.NOW)


SLEEPER = On(500, status="sleeping", wants_mb=13500)


def test_memory_that_sleeping_models_need_is_spared() -> None:
    """Preferred while there is room elsewhere; never a reason to exclude the device."""
    where = fleet(host("n", 24000, 24000, models={"s": On(1000, status="sleeping", wants_mb=20000)}))
    for vram_mb, devices, fit in ((2000, (0,), Fit.NOW), (8000, (1,), Fit.NOW)):
        plan = plan_for(view(where, profile(vram_mb=vram_mb)))
        assert (plan.devices, plan.fit) == (devices, fit)
    both = plan_for(view(where, profile(vram_mb=16000, min_devices=2)))
    assert (both.devices, both.fit) == ((0, 1), Fit.OVER_SLEEPERS)


def test_a_sleeping_model_wakes_where_it_sleeps() -> None:
    """It wakes on its own devices even when others are better; nothing is reloaded."""
    plan = plan_for(view(fleet(host("n", 24000, 14000, models={"m": SLEEPER})), profile(vram_mb=14000)))
    assert (plan.fit, plan.wakes, plan.devices) == (Fit.AWAKE, True, (0,))


@pytest.mark.parametrize("protocol_v1", [False, True])
def test_memory_that_a_sleeping_model_holds_counts_for_waking_it(protocol_v1: bool) -> None:
    """A model that fills its card never has all of it free while it sleeps there."""
    full = host("n", 24000, models={"m": On(1000, status="sleeping", wants_mb=22500)}, protocol_v1=protocol_v1)
    plan = plan_for(view(fleet(full), profile(vram_mb=23500)))
    assert (plan.fit, plan.wakes, plan.spare_mb) == (Fit.AWAKE, True, 500)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        # the node's other GPU
        (
            fleet(host("n", 24000, 24000, models={"m": SLEEPER, "taker": On(20000)})),
            ("n", (1,), Fit.NOW, False),
        ),
        # another node
        (
            fleet(host("n", 24000, models={"m": SLEEPER, "taker": On(20000)}), host("o", 24000)),
            ("o", (0,), Fit.NOW, False),
        ),
        # no room elsewhere: evict the model that took its memory, then wake it
        (
            fleet(host("n", 24000, models={"m": SLEEPER, "taker": On(20000)})),
            ("n", (0,), Fit.AFTER_EVICTION, True),
        ),
    ],
)
def test_a_sleeper_whose_memory_was_taken(where: FleetSnapshot, expected: tuple[object, ...]) -> None:
    """It is loaded where there is room, else the model that took its memory is evicted."""
    plan = plan_for(view(where, profile(vram_mb=14000), waiting={"m": 1}))
    assert (plan.node, plan.devices, plan.fit, plan.wakes) == expected
    assert plan.ready_at <= NOW


def test_a_sleeper_of_unknown_size_wakes() -> None:
    """Its neuron says what it needs; otherwise an engine's default share is assumed."""
    for protocol_v1 in (False, True):
        where = fleet(
            host("n", 24000, models={"m": On(1000, status="sleeping", wants_mb=20000)}, protocol_v1=protocol_v1)
        )
        assert plan_for(view(where, profile())).wakes


@pytest.mark.parametrize("reserves", ["the sleeper", "the load"])
def test_memory_is_reserved_for_a_waking_model(reserves: str) -> None:
    """The memory stays reserved between the command and the neuron's booking."""
    where = fleet(host("n", 24000, models={"m": SLEEPER}))
    models = profile(vram_mb=14000), profile(id="x", vram_mb=12000)
    moment = view(where, *models)
    first, second = ("m", "x") if reserves == "the sleeper" else ("x", "m")
    moment = after_start(moment, plan_for(moment, first))
    assert planned(moment, second) is None


@pytest.mark.parametrize(("vram_mb", "booked"), [(None, {"m": 7000}), (7000, {})])
def test_the_size_is_the_catalogues_or_else_the_observed_one(vram_mb: int | None, booked: dict[str, int]) -> None:
    """The tightest fit is chosen by either figure."""
    moment = view(fleet(host("a", 24000), host("b", 8000)), profile(vram_mb=vram_mb), observed_share_mb=booked)
    assert (plan_for(moment).node, plan_for(moment).device_share_mb) == ("b", 7000)


def test_two_models_of_unknown_size_do_not_go_to_one_empty_card() -> None:
    """A load of unknown size may take the whole device, so all of it counts as taken until the neuron reports."""
    for protocol_v1 in (False, True):
        moment = view(
            fleet(host("n", 24000, 24000, protocol_v1=protocol_v1)),
            profile(),
            profile(id="x"),
            profile(id="y", vram_mb=8000),
        )
        first = plan_for(moment)
        moment = after_start(moment, first)
        assert first.devices == (0,)
        assert plan_for(moment, "x").devices == (1,)
        assert plan_for(moment, "y").devices == (1,)


def test_a_neuron_that_books_memory_decides_about_a_model_of_unknown_size() -> None:
    """It refuses at once, so nothing is evicted on a guess."""
    where = fleet(host("n", 24000, models={"x": On(20000)}))
    assert (plan_for(view(where, profile())).fit, evicted(plan_for(view(where, profile())))) == (Fit.NOW, set())


def test_a_model_of_unknown_size_takes_a_whole_card_of_a_protocol_v1_neuron() -> None:
    """An engine that finds too little memory there fails late and does not report its need: the idle model is
    evicted."""
    where = fleet(host("n", 24000, models={"x": On(20000)}, protocol_v1=True))
    assert (plan_for(view(where, profile())).fit, evicted(plan_for(view(where, profile())))) == (
        Fit.AFTER_EVICTION,
        {"x"},
    )


@pytest.mark.parametrize(
    ("where", "tried"),
    [
        (fleet(host("n", 24000)), True),  # larger than any device: an estimate may be wrong
        (fleet(host("n", 48000, foreign_mb=(40000,))), True),  # held by an unknown process that may be gone
        (fleet(host("n", 24000, models={"x": On(20000)})), True),
        (fleet(host("n", 24000, models={"top": On(20000)})), False),  # held by a model that may not be evicted
        (fleet(host("n", 24000, models={"x": On(20000, status="loading")})), True),
    ],
)
def test_figures_alone_never_refuse(where: FleetSnapshot, tried: bool) -> None:
    """`vram_mb` is an estimate: when only the figures rule out a load, the neuron decides."""
    plan = planned(view(where, profile(vram_mb=30000), profile(id="top", residency_priority=500)))
    assert (plan is not None) is tried
    if plan is not None:
        assert plan.fit is Fit.TOO_LARGE
        assert plan.spare_mb < 0


@pytest.mark.parametrize(("protocol_v1", "evicts"), [(False, set()), (True, {"x"})])
def test_a_neuron_that_books_memory_decides_before_anything_is_evicted(protocol_v1: bool, evicts: set[str]) -> None:
    """It refuses by its figures at once. Others only find out by trying with the whole device."""
    where = fleet(host("n", 24000, models={"x": On(20000)}, protocol_v1=protocol_v1))
    plan = plan_for(view(where, profile(vram_mb=30000)))
    assert (plan.fit, evicted(plan)) == (Fit.TOO_LARGE, evicts)


@pytest.mark.parametrize("status", ["loading", "reloading", "recovering"])
def test_a_plan_waits_for_loads_to_finish(status: str) -> None:
    """A loading model can only be evicted once it is loaded."""
    where = fleet(host("n", 24000, models={"x": On(20000, status=status)}))
    found = evaluate_node(view(where, profile(vram_mb=14000)), profile(vram_mb=14000), where.nodes["n"])
    assert (found.plan, found.temporary) == (None, True)


def test_a_plan_waits_for_evictions_to_finish() -> None:
    """The memory is already promised, or about to be freed."""
    where = fleet(host("n", 24000, models={"x": On(20000)}), evicting=(("x", "n"),))
    found = evaluate_node(view(where, profile(vram_mb=14000)), profile(vram_mb=14000), where.nodes["n"])
    assert (found.plan, found.temporary) == (None, True)


def test_a_load_that_does_not_fit_is_not_tried_while_another_node_may_take_it() -> None:
    """Waiting for a model to leave is better than trying a load that may not fit."""
    where = fleet(host("a", 12000), host("n", 24000, models={"x": On(20000)}), evicting=(("x", "n"),))
    assert planned(view(where, profile(vram_mb=14000))) is None


@pytest.mark.parametrize(
    ("backoffs", "expected"),
    [
        ({("m", "a"): Backoff(NOW + 5, "out of memory")}, "b"),
        ({("m", "*"): Backoff(NOW + 5, "bad flag")}, None),
        ({("m", "a"): Backoff(NOW - 1, "long ago")}, "a"),
        ({("x", "a"): Backoff(NOW + 5, "another's")}, "a"),
        ({("m", "a"): Backoff(NOW + 5, "a race", temporary=True)}, "b"),
    ],
)
def test_load_backoffs(backoffs: dict[tuple[str, str], Backoff], expected: str | None) -> None:
    """A failed load is not tried again on that node for a while."""
    found = planned(view(fleet(host("a", 12000), host("b", 24000)), profile(vram_mb=8000), backoffs=backoffs))
    assert (found and found.node) == expected


def test_expected_time_is_that_of_the_node_else_the_longest_elsewhere() -> None:
    """It is None for a model that was never loaded."""
    where = fleet(host("a", 24000))
    times = {"m": {"b": 40.0, "c": 90.0}}
    assert plan_for(view(where, profile(vram_mb=8000), load_secs=times)).expected_secs == 90.0
    assert plan_for(view(where, profile(vram_mb=8000), load_secs={"m": {"a": 7.0}})).expected_secs == 7.0
    assert plan_for(view(where, profile(vram_mb=8000))).expected_secs is None


def _crowded(order: tuple[int, ...]) -> PlanningView:
    nodes = [
        host("a", 24000, 24000, models={"x": On(20000), "y": On(20000, devices=(1,))}),
        host("b", 24000, models={"x": On(20000)}),
        host("c", 48000, models={"z": On(40000), "s": On(500, status="sleeping", wants_mb=7000)}),
        host("d", 12000, models={"m": On(status="unloaded")}),
    ]
    return view(fleet(*(nodes[i] for i in order)), *_MODELS, usages={("z", "c"): used(2)})


_MODELS: tuple[ModelProfile, ...] = (
    profile(vram_mb=14000),
    profile(id="pair", vram_mb=40000, min_devices=2),
    profile(id="big", vram_mb=45000),
)


@pytest.mark.parametrize("model_id", [each.id for each in _MODELS])
def test_plans_do_not_depend_on_the_order_of_the_nodes(model_id: str) -> None:
    """The same view gives the same plan; nothing outside the view counts."""
    plans = [plan_for(_crowded(order), model_id) for order in permutations(range(4))]
    assert all(plan == plans[0] for plan in plans)


def test_every_node_gives_a_reason() -> None:
    """Each node has a readable verdict."""
    moment = _crowded((0, 1, 2, 3))
    have_it = host("b", 24000, models={"m": On(14000)})
    moment = replace(moment, fleet=replace(moment.fleet, nodes={**moment.fleet.nodes, "b": have_it}))
    found = all_verdicts(moment, _MODELS[0])
    assert {each.node: each.reason for each in found} == {
        "a": "fits after evicting x",
        "b": "already serves it",
        "c": "fits after evicting z",
        "d": "needs 14000 MiB on each device, 2000 MiB more than available; trying anyway",
    }
    assert best_plan(found) == found[0].plan
