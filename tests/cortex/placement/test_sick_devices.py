"""Devices with a fault: what is placed, woken, moved and removed because of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.inputs import PlanningView
from cortex.placement.planner import evaluate_node
from cortex.placement.replicas import reconcile_replicas
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import profile, used, view

SIZE, MB = 24_000, 14_000
FAULT = "Xid 79: the GPU has fallen off the bus"


def sick(node: NodeSnapshot, *devices: int) -> NodeSnapshot:
    """The node with a fault on each of these devices, as its neuron reports it: nothing can be booked there."""
    assert node.health is not None
    health = [
        each.model_copy(update={"fault": FAULT, "vram_bookable_mb": 0}) if each.index in devices else each
        for each in node.health.devices
    ]
    return replace(node, health=node.health.model_copy(update={"devices": health}))


def pair(models: dict[str, On] | None = None, name: str = "a") -> NodeSnapshot:
    return host(name, SIZE, SIZE, models=models, instances=True)


def model(**fields: Any) -> ModelProfile:
    return profile(vram_mb=MB, **fields)


def changes(moment: PlanningView) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
    """Where the model is loaded, and from where it is removed."""
    found = reconcile_replicas(moment, moment.catalogue.models)
    return [(plan.node, plan.devices) for plan, _ in found.loads], [each.key.name for each in found.removals]


def test_nothing_is_loaded_on_a_sick_device() -> None:
    """Not by evicting what is there either; without another device the node says why not."""
    other = On(MB, (1,))
    verdict = evaluate_node(view(fleet(sick(pair(), 0)), model()), model(), sick(pair(), 0))
    assert verdict.plan is not None
    assert verdict.plan.devices == (1,)
    full = sick(pair({"other": On(MB, (0,))}), 0, 1)
    assert evaluate_node(view(fleet(full), model()), model(), full).plan is None
    assert f"device 0 cannot be used ({FAULT})" in evaluate_node(view(fleet(full), model()), model(), full).reason
    busy = sick(pair({"other": other}), 0)
    plan = evaluate_node(view(fleet(busy), model()), model(), busy).plan
    assert plan is not None
    assert [each.resident.key.model_id for each in plan.eviction_plan.evictions] == ["other"]


def test_a_model_that_sleeps_on_a_sick_device_is_loaded_elsewhere() -> None:
    """It is removed there, since it cannot wake."""
    node = sick(pair({"m": On(500, (0,), "sleeping", wants_mb=MB - 500)}), 0)
    plan = evaluate_node(view(fleet(node), model()), model(), node).plan
    assert plan is not None
    assert (plan.devices, plan.wakes) == ((1,), False)
    assert changes(view(fleet(node), model())) == ([], ["a"])


def test_an_engine_in_use_is_replaced_before_it_is_removed() -> None:
    """On another device of the host, or another host. Where there is no place it stays."""
    using = {("m", "a", "0"): used(1, idle=0)}
    node = sick(pair({"m": On(MB, (0,))}), 0)
    assert changes(view(fleet(node), model(), usages=using)) == ([("a", (1,))], [])
    both = sick(pair({"m": On(MB, (0,))}), 0, 1)
    assert changes(view(fleet(both, host("b", SIZE)), model(), usages=using)) == ([("b", (0,))], [])
    assert changes(view(fleet(both), model(), usages=using)) == ([], [])
    replaced = sick(pair({"m": On(MB, (0,)), "m#1": On(MB, (1,))}), 0)
    assert changes(view(fleet(replaced), model(), usages=using)) == ([], ["a"])


def test_an_idle_engine_is_removed_if_it_can_be_loaded_elsewhere() -> None:
    """With a minimum it is replaced first."""
    node = sick(pair({"m": On(MB, (0,))}), 0)
    assert changes(view(fleet(node), model())) == ([], ["a"])
    alone = sick(host("a", SIZE, models={"m": On(MB)}, instances=True), 0)
    assert changes(view(fleet(alone), model())) == ([], [])
    assert changes(view(fleet(node), model(replicas={"min": 1}))) == ([("a", (1,))], [])


def test_requests_go_to_the_other_engine() -> None:
    """An engine on a sick device serves only while no other one does."""
    alone = fleet(sick(pair({"m": On(MB, (0,))}), 0))
    assert [engine.key.name for engine in alone.serving("m")] == ["a"]
    both = fleet(sick(pair({"m": On(MB, (0,)), "m#1": On(MB, (1,))}), 0))
    assert [engine.key.instance for engine in both.serving("m")] == ["1"]
