"""What is decided for a request, case by case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cortex.config.catalogue import Catalogue
from cortex.control.decision import Attach, Await, Decision, Place, Refuse, Serve, decide
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, by_instance
from cortex.routing.replica import ReplicaKey
from shared.protocol import ModelActivity, ModelView, NeuronHealth
from tests.cortex.fleets import fleet, node, replica_key

CATALOGUE = Catalogue.model_validate({"models": [{"id": "m", "vram_mb": 4000}, {"id": "pinned", "pinned_on": ["a"]}]})

ADAPTED = Catalogue.model_validate({"models": [{"id": "m"}, {"id": "x", "base": "m", "lora": "/x"}]})


def a(status: str | None = None, *, model: str = "m", healthy: bool = True, draining: bool = False) -> NodeSnapshot:
    return node("a", 24000, models={model: status} if status else {}, healthy=healthy, draining=draining)


def b(status: str | None = None) -> NodeSnapshot:
    return node("b", 12000, models={"m": status} if status else {})


def served(*nodes: str) -> Serve:
    return Serve(tuple(replica_key("m", name) for name in nodes))


def decision(model: str, where: FleetSnapshot, busy: Callable[[ReplicaKey], int] = lambda key: 0) -> Decision:
    return decide(model, CATALOGUE, where, busy)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (fleet(a("loaded"), b()), served("a")),
        (fleet(a("loaded"), b("loaded")), served("a", "b")),
        (fleet(a("loaded", draining=True), b("loaded")), served("b")),
        (fleet(a("loaded", draining=True), b()), served("a")),  # no other neuron has it
        (
            fleet(a("loaded"), b("loaded"), evicting=(("m", "a"),)),
            served("b"),
        ),  # no requests during eviction
        (fleet(a("loading"), b()), Await("a")),
        (fleet(a("reloading"), b()), Await("a")),
        (fleet(a("recovering"), b("loaded")), served("b")),
    ],
)
def test_a_loaded_model_is_served(where: FleetSnapshot, expected: Decision) -> None:
    """A loaded replica comes first; a loading one is waited for."""
    assert decision("m", where) == expected


@pytest.mark.parametrize(
    "where",
    [
        fleet(a("unloaded"), b()),
        fleet(a("sleeping"), b()),
        fleet(a("failed"), b()),
        fleet(a("loaded", healthy=False), b()),
        fleet(a("loading", healthy=False), b()),
        fleet(a("what is this"), b()),
        fleet(a("loaded"), b(), evicting=(("m", "a"),)),
        fleet(a(), b()),
        fleet(),
    ],
)
def test_a_catalogue_model_that_is_not_loaded_is_placed(where: FleetSnapshot) -> None:
    """The planner says where, or why nowhere."""
    assert decision("m", where) == Place()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (fleet(a("unloaded", model="own"), b()), True),
        (fleet(a("sleeping", model="own"), b()), True),
        (fleet(a("loaded", model="own"), b(), evicting=(("own", "a"),)), True),
        (fleet(a("unloaded", model="own", healthy=False), b()), False),
        (fleet(a("failed", model="own"), b()), False),
    ],
)
def test_a_model_outside_the_catalogue_is_placed_where_it_can_be_loaded_again(
    where: FleetSnapshot, expected: bool
) -> None:
    """A healthy neuron that can load it again, or will when it has left."""
    assert (decision("own", where) == Place()) is expected


@pytest.mark.parametrize(
    ("where", "code"),
    [
        (fleet(a(), b()), "model_not_found"),
        (fleet(a("loaded", model="other", healthy=False), b()), "neuron_unavailable"),
        (fleet(a("failed", model="other"), b()), "cold_load_failed"),
        (fleet(a(healthy=False), b()), "model_not_found"),
        (fleet(node("a", healthy=False, discovered=False)), "no_healthy_neurons"),
    ],
)
def test_refusals(where: FleetSnapshot, code: str) -> None:
    """Each case has its documented code; a temporary one has a Retry-After."""
    found = decision("other", where)
    assert isinstance(found, Refuse)
    assert found.error.code == code
    assert (found.error.retry_after is not None) is (found.error.status == 503)


def test_least_busy_replica_comes_first() -> None:
    """Our own requests decide, then names."""
    where = fleet(a("loaded"), b("loaded"))
    assert decision("m", where, lambda key: {"a": 3, "b": 1}[key.node]) == served("b", "a")


@pytest.mark.parametrize(
    ("ours", "reported", "first"),
    [
        ((1, 0), (0, 0), "b"),
        ((1, 0), (0, 2), "a"),  # another cortex's two outweigh our one
        ((2, 1), (2, 2), "a"),  # ours are not counted again
        ((0, 0), (2, 1), "b"),
    ],
)
def test_work_of_others_counts(ours: tuple[int, int], reported: tuple[int, int], first: str) -> None:
    """Reported work counts as far as it exceeds our own requests."""
    nodes = [
        replace(entry, health=NeuronHealth(models=[ModelActivity(id="m", in_flight=running)]))
        for entry, running in zip((a("loaded"), b("loaded")), reported, strict=True)
    ]
    found = decision("m", fleet(*nodes), lambda key: ours["ab".index(key.node)])
    assert isinstance(found, Serve)
    assert found.replicas[0].node == first


def test_a_lost_neuron_serves_nothing() -> None:
    """What a lost neuron last reported does not count."""
    lost = replace(a("loaded"), healthy=False)
    assert decision("m", fleet(lost, b("loaded"))) == served("b")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ({"a": ["x"], "b": []}, served("a")),
        ({"a": [], "b": []}, Attach(served("a", "b").replicas)),
        ({"a": ["y"]}, Attach(served("a").replicas)),
    ],
)
def test_an_adapter_is_served_where_it_is(nodes: dict[str, list[str]], expected: Decision) -> None:
    """By the engines of its base that have it; otherwise one of them has to load it."""
    assert decide("x", ADAPTED, _adapted(nodes), lambda key: 0) == expected


def test_an_adapter_leaves_a_draining_node() -> None:
    """It is loaded at another engine of its base, although one on the draining node has it."""
    where = _adapted({"a": ["x"], "b": []}, draining="a")
    assert decide("x", ADAPTED, where, lambda key: 0) == Attach(served("b").replicas)


def test_an_adapter_brings_its_base() -> None:
    """Without an engine of the base it is placed as the base is; one that starts is waited for; one that takes no
    adapters is the reason for a refusal."""
    for there, expected in ((a(), Place()), (a("loading"), Await("a"))):
        assert decide("x", ADAPTED, replace(fleet(there), catalogue=ADAPTED), lambda key: 0) == expected
    refused = decide("x", ADAPTED, replace(fleet(a("loaded")), catalogue=ADAPTED), lambda key: 0)
    assert isinstance(refused, Refuse)
    assert (refused.error.status, refused.error.code) == (503, "adapter_failed")


def _adapted(nodes: dict[str, list[str]], draining: str = "") -> FleetSnapshot:
    """Nodes with an engine of m each, and its adapters."""
    found = [
        replace(
            node(name, 24000, draining=name == draining),
            models=by_instance([ModelView(id="m", status="loaded", max_loras=2, adapters=adapters)]),
        )
        for name, adapters in nodes.items()
    ]
    return replace(fleet(*found), catalogue=ADAPTED)
