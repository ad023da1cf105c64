"""Several instances of one model: on which nodes and devices, how many at once, and which of them go."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from cortex.config.profile import ModelProfile
from cortex.control.explain import explain
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, Reservation
from cortex.placement.capacity import device_memory
from cortex.placement.fair_queue import after_start
from cortex.placement.inputs import Backoff, PlanningView
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.planner import all_verdicts, best_plan, evaluate_node
from cortex.placement.replicas import MAX_AT_ONCE, reconcile_replicas
from cortex.routing.replica import ReplicaKey
from shared.protocol import LinkKind
from tests.cortex.fleets import On, fleet, host, node
from tests.cortex.views import NOW, evicted, plan_for, profile, used, view

H100 = 81559
SMALL = 20000
PAIRS = {(0, 1): LinkKind.NVLINK, (2, 3): LinkKind.NVLINK, (4, 5): LinkKind.NVLINK, (6, 7): LinkKind.NVLINK}


def eight(name: str = "a", models: dict[str, On] | None = None, **fields: Any) -> NodeSnapshot:
    """A host with eight H100 in NVLink pairs."""
    return host(name, *[H100] * 8, models=models, links=PAIRS, instances=True, **fields)


def kept(minimum: int, maximum: int | None = None, per_node: int | None = None, **fields: Any) -> ModelProfile:
    replicas = {"min": minimum, "max": maximum or max(1, minimum), "per_node": per_node}
    return profile(vram_mb=SMALL, replicas=replicas, **fields)


def loads(moment: PlanningView, *models: ModelProfile) -> list[LoadPlan]:
    return [plan for plan, _ in reconcile_replicas(moment, models or moment.catalogue.models).loads]


def removed(moment: PlanningView) -> list[ReplicaKey]:
    return [each.key for each in reconcile_replicas(moment, moment.catalogue.models).removals]


def where(plans: list[LoadPlan]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(plan.node, plan.instance, plan.devices) for plan in plans]


def loaded(count: int, mb: int = SMALL, *, skip: int = 0, **fields: Any) -> dict[str, On]:
    """Instances of m, one on each device after the first `skip`."""
    return {f"m#{index}": On(mb, (index + skip,), **fields) for index in range(count)}


def test_all_missing_instances_are_planned_at_once() -> None:
    """Eight on eight devices, each with a name of its own."""
    assert where(loads(view(fleet(eight()), kept(8)))) == [("a", str(i), (i,)) for i in range(8)]


def test_beside_a_larger_model_there_are_fewer() -> None:
    """It takes two devices; nothing is evicted for copies that do not fit, and the count stays below the minimum."""
    moment = view(fleet(eight(models={"big": On(70000, (2, 3))})), kept(8), profile(id="big", residency_priority=200))
    assert [plan.devices for plan in loads(moment)] == [(0,), (1,), (4,), (5,), (6,), (7,)]


@pytest.mark.parametrize("big_first", [True, False])
@pytest.mark.parametrize("priority", [100, 200])
def test_minimums_share_the_devices(big_first: bool, priority: int) -> None:
    """Every model gets its first replica before another gets a second; the one with more devices chooses first."""
    small = kept(8)
    big = profile(id="big", vram_mb=140_000, min_devices=2, replicas={"min": 1}, residency_priority=priority)
    models = (big, small) if big_first else (small, big)
    plans = loads(view(fleet(eight()), *models))
    assert [plan.devices for plan in plans if plan.model_id == "big"] == [(0, 1)]
    assert sorted(plan.devices for plan in plans if plan.model_id == "m") == [(i,) for i in range(2, 8)]


def test_minimums_are_shared_out_evenly_unless_one_has_priority() -> None:
    """Also when some of them are there already."""
    filling = {"vram_mb": 70_000}
    other = kept(8, id="other").model_copy(update=filling)
    mine = kept(8).model_copy(update=filling)
    assert Counter(plan.model_id for plan in loads(view(fleet(eight()), mine, other))) == {"m": 4, "other": 4}
    there = fleet(eight(models=loaded(3, 70_000)))
    assert Counter(plan.model_id for plan in loads(view(there, mine, other))) == {"m": 1, "other": 4}
    first = other.model_copy(update={"residency_priority": 200})
    assert Counter(plan.model_id for plan in loads(view(fleet(eight()), mine, first))) == {"other": 8}


def test_explain_counts_against_the_minimum() -> None:
    """Six of eight beside a model that stays; then what is in their way."""
    big = profile(id="big", vram_mb=140_000, residency_priority=200)
    there = {**loaded(6, skip=2), "big": On(140_000, (0, 1))}
    told = explain("m", view(fleet(eight(models=there)), kept(8), big), lambda _: 0)
    assert (told["replicas"]["serving"], told["replicas"]["min"], told["replicas"]["coming"]) == (6, 8, 0)
    assert "big stays (priority 200 is above 100)" in told["replicas"]["missing_because"]
    [node_] = told["nodes"]
    assert [each["devices"] for each in node_["instances"]] == [[index] for index in range(2, 8)]
    told = explain("m", view(fleet(eight(models=loaded(6))), kept(8)), lambda _: 0)
    assert told["replicas"]["missing_because"] == "about to be loaded on a"
    assert explain("big", view(fleet(eight()), big), lambda _: 0)["replicas"] is None


def test_the_larger_model_finds_a_whole_pair() -> None:
    """Six instances fill three pairs; whatever was loaded on the way."""
    moment = view(fleet(eight()), kept(6))
    for plan in loads(moment):
        moment = after_start(moment, plan)
    wanted = profile(id="big", vram_mb=140_000, min_devices=2)
    found = best_plan(all_verdicts(moment, wanted))
    assert found is not None
    assert (found.devices, found.fit) == ((6, 7), Fit.NOW)


def test_hosts_come_before_devices() -> None:
    """Instances are spread over the hosts for availability, then packed."""
    assert Counter(plan.node for plan in loads(view(fleet(eight("a"), eight("b")), kept(6)))) == {"a": 3, "b": 3}
    moment = view(fleet(eight("a", loaded(3)), eight("b")), kept(6))
    assert where(loads(moment)) == [("b", "0", (0,)), ("b", "1", (1,)), ("b", "2", (2,))]
    moment = view(fleet(eight("a", loaded(1)), host("b", H100)), kept(4))
    assert where(loads(moment)) == [("b", "", (0,)), ("a", "1", (1,)), ("a", "2", (2,))]


@pytest.mark.parametrize(
    ("node_", "model", "expected"),
    [
        (eight(), kept(8, per_node=3), ["0", "1", "2"]),
        (eight(models=loaded(2)), kept(8, per_node=3), ["2"]),
        (eight(models=loaded(3)), kept(8, per_node=3), []),
        (eight(models=loaded(3, status="loading")), kept(8, per_node=3), []),
        (host("a", *[H100] * 8), kept(8), [""]),  # a neuron that has one engine for each model
        (host("a", *[H100] * 8, protocol_v1=True), kept(8, per_node=8), [""]),
        (host("a", H100, instances=True), kept(8), ["0"]),  # two never share a device
        (host("a", H100, H100, instances=True), kept(8, min_devices=2), ["0"]),
        (host("a", *[H100] * 5, instances=True), kept(8, min_devices=2), ["0", "1"]),
        (host("a", 10000, H100, instances=True), kept(8, min_device_vram_mb=20000), ["0"]),
        (host("a", H100, H100, instances=True, lost=(0,)), kept(8), ["0"]),
    ],
)
def test_how_many_a_node_holds(node_: NodeSnapshot, model: ModelProfile, expected: list[str]) -> None:
    assert [plan.instance for plan in loads(view(fleet(node_), model))] == expected


def test_hosts_without_devices_hold_none() -> None:
    """The planner places nothing there; `per_node` does not change that."""
    bare = node("a")
    assert loads(view(fleet(bare), kept(4, per_node=4))) == []


def test_names_of_failed_instances_are_used_again() -> None:
    """A failed engine is loaded again under its name, beside those that run."""
    models = {**loaded(3), "m#1": On(0, (), "failed")}
    assert where(loads(view(fleet(eight(models=models)), kept(4)))) == [("a", "1", (1,)), ("a", "3", (3,))]


def test_what_counts_as_coming() -> None:
    """A recovering engine is restarted by its neuron, unless its device is lost; a dead neuron restarts none."""
    models = {**loaded(3), "m#3": On(SMALL, (3,), "recovering")}
    assert loads(view(fleet(eight(models=models)), kept(4))) == []
    assert where(loads(view(fleet(eight(models=models, lost=(3,))), kept(4)))) == [("a", "4", (4,))]
    gone = fleet(eight("a", models, healthy=False), eight("b"))
    assert [plan.node for plan in loads(view(gone, kept(4)))] == ["b"] * 4
    ours = (Reservation("m", "a", (4,), SMALL, "4"), Reservation("m", "a", (5,), SMALL, "5"))
    assert where(loads(view(fleet(eight(models=models), reservations=ours), kept(7)))) == [("a", "6", (6,))]


def test_a_drained_neuron_is_replaced_at_once() -> None:
    moment = view(fleet(eight("a", loaded(4), draining=True), eight("b")), kept(4))
    assert where(loads(moment)) == [("b", str(i), (i,)) for i in range(4)]


def test_after_a_failure_none_is_added_there_for_a_while() -> None:
    moment = view(fleet(eight("a"), eight("b")), kept(4), backoffs={("m", "a"): Backoff(NOW + 5, "no")})
    assert [plan.node for plan in loads(moment)] == ["b"] * 4


def test_a_sleeping_instance_wakes_before_another_is_loaded() -> None:
    """It keeps its devices and its name. No other instance may have taken its device meanwhile."""
    asleep = On(500, (1,), "sleeping", wants_mb=SMALL - 500)
    plans = loads(view(fleet(eight(models={"m": On(SMALL), "m#1": asleep})), kept(3)))
    assert [(plan.instance, plan.devices, plan.wakes) for plan in plans] == [("1", (1,), True), ("2", (2,), False)]
    taken = fleet(eight(models={"m": On(SMALL, (1,)), "m#1": asleep}))
    assert [(plan.devices, plan.wakes) for plan in loads(view(taken, kept(2)))] == [((0,), False)]


@pytest.mark.parametrize(
    ("models", "maximum", "expected"),
    [
        (loaded(1), 8, ["1"]),  # one at a time
        (loaded(7), 8, ["7"]),
        (loaded(8), 8, []),
        (loaded(3), 3, []),
        ({**loaded(1), **{f"x{i}": On(70000, (i,)) for i in range(1, 8)}}, 8, []),  # only free memory
        ({**loaded(2), "m#1": On(SMALL, (1,), "loading")}, 8, []),
    ],
)
def test_pressure_adds_an_instance_on_the_same_host(models: dict[str, On], maximum: int, expected: list[str]) -> None:
    moment = view(fleet(eight(models=models)), kept(0, maximum), overloaded_secs={"m": 6})
    assert [plan.instance for plan in loads(moment)] == expected


def test_idle_instances_are_removed_one_by_one() -> None:
    """The least recently used ones of the host, down to the minimum."""
    idle = {("m", "a", str(i)): used(idle=600 - i) for i in range(4)}
    moment = view(fleet(eight(models=loaded(4))), kept(2, 4), usages=idle)
    assert removed(moment) == [ReplicaKey("m", "a", "0"), ReplicaKey("m", "a", "1")]
    busy = {**idle, ("m", "a", "0"): used(3, idle=600)}
    moment = view(fleet(eight(models=loaded(4))), kept(2, 4), usages=busy)
    assert removed(moment) == [ReplicaKey("m", "a", "1"), ReplicaKey("m", "a", "2")]


def test_surplus_instances_are_removed() -> None:
    """Where a device or a neuron came back with what was replaced meanwhile."""
    moment = view(
        fleet(eight(models=loaded(3))), kept(2), usages={("m", "a", str(i)): used(idle=400 - i) for i in range(3)}
    )
    assert removed(moment) == [ReplicaKey("m", "a", "0")]
    one = view(
        fleet(eight(models=loaded(2))), profile(), usages={("m", "a", str(i)): used(idle=400 - i) for i in range(2)}
    )
    assert removed(one) == [ReplicaKey("m", "a", "0")]


BIG = profile(id="big", vram_mb=140_000, min_devices=2)


@pytest.mark.parametrize(
    ("minimum", "newcomer", "count"),
    [
        (0, BIG, 2),
        (6, BIG, 2),
        (7, BIG, None),  # the minimum would be broken by the second
        (8, BIG, None),
        (8, BIG.model_copy(update={"residency_priority": 200}), 2),
        (4, profile(id="big", vram_mb=4 * 70_000, min_devices=4), 4),
        (5, profile(id="big", vram_mb=4 * 70_000, min_devices=4), None),
    ],
)
def test_displacement_takes_single_instances_above_the_minimum(
    minimum: int, newcomer: ModelProfile, count: int | None
) -> None:
    """A model that needs several devices evicts that many instances, and keeps `replicas.min` of them."""
    moment = view(fleet(eight(models=loaded(8))), kept(minimum, 8), newcomer, waiting={"big": 5})
    plans = [each.plan for each in all_verdicts(moment, newcomer) if each.plan is not None]
    gone = [len(plan.eviction_plan.evictions) for plan in plans if plan.fit is Fit.AFTER_EVICTION]
    assert gone == ([] if count is None else [count])
    assert all(evicted(plan) <= {"m"} for plan in plans)


def test_displacement_prefers_idle_instances() -> None:
    """Each instance is judged by its own requests."""
    uses = {("m", "a", str(i)): used(2 if i < 6 else 0) for i in range(8)}
    moment = view(fleet(eight(models=loaded(8))), kept(0, 8), BIG, usages=uses, waiting={"big": 5})
    plan = plan_for(moment, "big")
    assert plan.devices == (6, 7)
    assert {each.resident.key.instance for each in plan.eviction_plan.evictions} == {"6", "7"}


def test_one_pass_keeps_the_minimum_over_several_newcomers() -> None:
    """Two models that each evict some of m must not break its minimum together."""
    others = [kept(1, id=f"n{i}").model_copy(update={"vram_mb": 70_000}) for i in range(4)]
    moment = view(fleet(eight(models=loaded(8))), kept(6, 8), *others)
    plans = loads(moment, *others)
    assert sum(len(plan.eviction_plan.evictions) for plan in plans) == 2


def test_an_instance_that_ends_leaves_room_for_another_elsewhere() -> None:
    """A waiting request does not wait for the end of an engine if another device is free."""
    moment = view(fleet(eight(models=loaded(1)), evicting=(("m", "a", "0"),)), profile(vram_mb=SMALL))
    plan = plan_for(moment)
    assert (plan.instance, plan.devices) == ("1", (1,))
    single = host("a", H100, models=loaded(1), instances=True)
    moment = view(fleet(single, evicting=(("m", "a", "0"),)), profile(vram_mb=SMALL))
    verdict = evaluate_node(moment, moment.catalogue.models[0], single)
    assert (verdict.plan, verdict.reason, verdict.temporary) == (None, "is unloading it", True)


def test_why_a_node_gets_no_other_instance() -> None:
    moment = view(fleet(eight(models=loaded(8))), kept(9))
    verdict = evaluate_node(moment, moment.catalogue.models[0], moment.fleet.nodes["a"])
    assert verdict.reason == "already serves it with 8 instances"


def test_a_pass_adds_a_bounded_number() -> None:
    """So that it does not hold up requests; the next pass adds the rest."""
    nodes = [eight(f"n{i:02}") for i in range(20)]
    plans = loads(view(fleet(*nodes), kept(100)))
    assert len(plans) == MAX_AT_ONCE
    assert set(Counter(plan.node for plan in plans).values()) == {3, 4}


def _random_fleet(source: random.Random) -> FleetSnapshot:
    nodes = []
    for number in range(source.randint(1, 4)):
        count = source.choice((1, 2, 4, 8))
        models: dict[str, On] = {}
        free = list(range(count))
        source.shuffle(free)
        while free and source.random() < 0.5:
            models[f"m#{len(models)}"] = On(SMALL, (free.pop(),), source.choice(("loaded", "loading", "recovering")))
        models |= {f"x{index}": On(source.choice((30000, 70000)), (index,)) for index in free if source.random() < 0.3}
        islands = {(a, b): LinkKind.NVLINK for a, b in pairwise(range(count)) if source.random() < 0.5}
        nodes.append(
            host(
                f"n{number}",
                *[H100] * count,
                models=models,
                links=islands,
                instances=source.random() < 0.8 or any("#" in key and key != "m#0" for key in models),
                healthy=source.random() < 0.9,
            )
        )
    return fleet(*nodes)


@pytest.mark.parametrize("seed", range(300))
def test_properties_of_several_loads(seed: int) -> None:
    """No two instances share a device or a name, none is planned beyond its node's limits or into missing memory, and
    hosts with fewer instances come first among those where it fits as well."""
    source = random.Random(seed)
    size, per_node = source.choice((1, 1, 2)), source.choice((None, None, 1, 2))
    model = kept(source.randint(1, 12), per_node=per_node, min_devices=size).model_copy(
        update={"vram_mb": SMALL * size}
    )
    others = [profile(id=f"x{i}", vram_mb=source.choice((30000, 70000))) for i in range(8)]
    moment = view(_random_fleet(source), model, *others)
    active = {
        each.key: set(each.view.devices) for each in moment.fleet.engines("m") if each.view.loaded or each.view.coming
    }
    for plan in loads(moment, model):
        where = moment.fleet.nodes[plan.node]
        assert plan.key not in active, seed
        beside = {key: devices for key, devices in active.items() if key.node == plan.node}
        assert not beside or where.has_instances, seed
        assert all(devices.isdisjoint(plan.devices) for devices in beside.values()), seed
        assert per_node is None or len(beside) < per_node, seed
        if plan.fit is Fit.NOW:
            memory = device_memory(moment, where)
            assert all(memory[index].free_mb >= plan.device_share_mb for index in plan.devices), seed
            for verdict in all_verdicts(moment, model):
                if verdict.plan is not None and verdict.plan.fit is Fit.NOW:
                    there = sum(key.node == verdict.node for key in active)
                    assert len(beside) <= there or plan.starts.rank < verdict.plan.starts.rank, seed
        active[plan.key] = set(plan.devices)
        moment = after_start(moment, plan)
