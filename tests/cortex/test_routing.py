"""What is decided for a request, case by case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cortex.catalogue import Catalogue
from cortex.routing import Await, Decision, Load, Refuse, Serve, decide, load_on
from cortex.snapshot import FleetSnapshot, NodeSnapshot
from shared.protocol import ModelActivity, NeuronHealth
from tests.cortex.fleets import fleet, node

CATALOGUE = Catalogue.model_validate(
    {"models": [{"id": "m", "vram_mb": 4000, "quant": "fp8", "args": ["--x"]}, {"id": "pinned", "pinned_on": ["a"]}]}
)


def a(status: str | None = None, *, model: str = "m", healthy: bool = True, draining: bool = False) -> NodeSnapshot:
    return node("a", 24000, models={model: status} if status else {}, healthy=healthy, draining=draining)


def b(status: str | None = None) -> NodeSnapshot:
    return node("b", 12000, models={"m": status} if status else {})


def decision(model: str, where: FleetSnapshot, busy: Callable[[str, str], int] = lambda m, n: 0) -> Decision:
    return decide(model, CATALOGUE, where, busy)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (fleet(a("loaded"), b()), Serve(("a",))),
        (fleet(a("loaded"), b("loaded")), Serve(("a", "b"))),
        (fleet(a("loaded", draining=True), b("loaded")), Serve(("b",))),
        (fleet(a("loaded", draining=True), b()), Serve(("a",))),  # nobody else has it
        (fleet(a("loading"), b()), Await("a")),
        (fleet(a("recovering"), b("loaded")), Serve(("b",))),
    ],
)
def test_what_is_there_is_used(where: FleetSnapshot, expected: Decision) -> None:
    """Loaded first; on its way is waited for."""
    assert decision("m", where) == expected


@pytest.mark.parametrize(
    ("where", "loads_on"),
    [
        (fleet(a("unloaded"), b()), "a"),
        (fleet(a("unloaded"), b("sleeping")), "b"),  # waking is faster than loading
        (fleet(a("failed"), b()), "b"),  # a failed entry is no reason to go there
        (fleet(a("loaded", healthy=False), b()), "b"),
        (fleet(a("unloaded", draining=True), b()), "b"),
        (fleet(a("what is this"), b()), "b"),
        (fleet(a(), b()), "b"),
    ],
)
def test_where_it_is_loaded(where: FleetSnapshot, loads_on: str) -> None:
    """Where it was before, else where it fits best."""
    found = decision("m", where)
    assert isinstance(found, Load)
    assert found.node == loads_on
    assert (found.command.quant, found.command.args, found.command.vram_mb) == ("fp8", ["--x"], 4000)


@pytest.mark.parametrize(
    ("model", "where", "code"),
    [
        ("m", fleet(), "no_healthy_neurons"),
        ("m", fleet(a(healthy=False)), "no_healthy_neurons"),
        ("pinned", fleet(a(healthy=False), b()), "neuron_unavailable"),
        ("pinned", fleet(a(draining=True), b()), "neuron_unavailable"),
        ("pinned", fleet(b()), "no_feasible_neuron"),
        ("other", fleet(a(), b()), "model_not_found"),
        ("other", fleet(a("loaded", model="other", healthy=False), b()), "neuron_unavailable"),
        ("other", fleet(a("failed", model="other"), b()), "cold_load_failed"),
        ("other", fleet(a(healthy=False), b()), "model_not_found"),
        ("other", fleet(node("a", healthy=False, discovered=False)), "no_healthy_neurons"),
    ],
)
def test_refusals(model: str, where: FleetSnapshot, code: str) -> None:
    """Each case of the contract; what is temporary says when to come back."""
    found = decision(model, where)
    assert isinstance(found, Refuse)
    assert found.error.code == code
    assert (found.error.retry_after is not None) is (found.error.status == 503)


def test_least_busy_replica_comes_first() -> None:
    """Our own requests decide before names do."""
    where = fleet(a("loaded"), b("loaded"))
    assert decision("m", where, lambda model, name: {"a": 3, "b": 1}[name]) == Serve(("b", "a"))


@pytest.mark.parametrize(
    ("ours", "reported", "first"),
    [
        ((1, 0), (0, 0), "b"),
        ((1, 0), (0, 2), "a"),  # somebody else's two are more than our one
        ((2, 1), (2, 2), "a"),  # ours are not counted again
        ((0, 0), (2, 1), "b"),
    ],
)
def test_work_of_others_counts(ours: tuple[int, int], reported: tuple[int, int], first: str) -> None:
    """As far as it is more than ours."""
    nodes = [
        replace(entry, health=NeuronHealth(models=[ModelActivity(id="m", in_flight=running)]))
        for entry, running in zip((a("loaded"), b("loaded")), reported, strict=True)
    ]
    found = decision("m", fleet(*nodes), lambda model, name: ours["ab".index(name)])
    assert isinstance(found, Serve)
    assert found.nodes[0] == first


@pytest.mark.parametrize(("instance_id", "expected"), [("i", None), (None, [0])])
def test_a_sleeping_model_is_woken_where_it_sleeps(instance_id: str | None, expected: list[int] | None) -> None:
    """Not asked for on other devices, however much more is free there, nor with a changed spec: its neuron would
    refuse that. A seed neuron is told the whole spec, with the devices that the model has."""
    found = node("a", 24000, 24000, free_mb=(2000, 24000), models={"m": "sleeping"})
    assert found.discovery is not None
    discovery = found.discovery.model_copy(update={"instance_id": instance_id})
    sleeper = found.models["m"].model_copy(update={"devices": [0]})
    found = replace(found, discovery=discovery, models={"m": sleeper})
    for load in (decision("m", fleet(found)), load_on(CATALOGUE.models[0], fleet(found), found)):
        assert isinstance(load, Load)
        assert load.command.devices == expected
        assert load.command.bare is (instance_id is not None)
