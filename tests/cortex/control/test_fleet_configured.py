"""Neurons that come, go and move while the fleet is watched."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet, NodeRemoved, RouteChanges
from shared.protocol import Discovery, ModelView, NeuronHealth
from tests.cortex.fleets import replica_key


def fleet_of(*names: str) -> Fleet:
    return Fleet([(name, f"http://{name}") for name in names], unhealthy_after=3)


def configure(fleet: Fleet, *names: str, drained: tuple[str, ...] = (), **endpoints: str) -> None:
    nodes = [(name, endpoints.get(name, f"http://{name}")) for name in names]
    fleet.configure(nodes, unhealthy_after=3, drained=drained)


def poll(fleet: Fleet, name: str, *models: str) -> None:
    views = [ModelView(id=model, status="loaded") for model in models]
    fleet.record_poll(name, started=float("inf"), health=NeuronHealth(), models=views, discovery=Discovery())


def test_neurons_that_stay_keep_their_state() -> None:
    """Their state is kept when other neurons come or go."""
    fleet = fleet_of("a", "b")
    poll(fleet, "a", "m")
    before = fleet.snapshot()
    configure(fleet, "c", "a")
    after = fleet.snapshot()
    assert list(after.nodes) == ["c", "a"]
    assert after.nodes["a"] is before.nodes["a"]
    assert not after.nodes["c"].healthy
    assert list(before.nodes) == ["a", "b"], "a snapshot does not change"


def test_holders_follow_the_new_order() -> None:
    """Removed neurons hold nothing; later reports are stored in their place."""
    fleet = fleet_of("a", "b", "c")
    for name in ("a", "b", "c"):
        poll(fleet, name, "m", name)
    configure(fleet, "c", "d", "a")
    assert [node.name for node in fleet.snapshot().holders("m")] == ["c", "a"]
    assert sorted(fleet.snapshot().listed_models) == ["a", "c", "m"]
    poll(fleet, "d", "m")
    snapshot = fleet.snapshot()
    assert [node.name for node in snapshot.holders("m")] == ["c", "d", "a"]
    assert snapshot.holders("m") == FleetSnapshot(snapshot.nodes).holders("m")


def test_reports_about_a_removed_neuron_are_ignored() -> None:
    """A poll or a load may end after its neuron was removed."""
    fleet = fleet_of("a")
    configure(fleet)
    version = fleet.version
    poll(fleet, "a", "m")
    fleet.record_miss("a", "gone")
    fleet.update_model("a", ModelView(id="m", status="loaded"))
    fleet.remove_model("a", "m")
    fleet.loaded(replica_key("m", "a"), harness=None, devices=[])
    assert fleet.version == version
    assert not fleet.snapshot().nodes


async def test_a_wait_for_a_removed_neuron_ends() -> None:
    """Both kinds of wait end; a wait for another neuron continues."""
    fleet = fleet_of("a", "b")
    left = asyncio.create_task(fleet.until("a", lambda node: node.healthy))
    stays = asyncio.create_task(fleet.until("b", lambda node: node.healthy))
    change = asyncio.create_task(fleet.changed_since(fleet.version))
    await asyncio.sleep(0)
    configure(fleet, "b")
    with pytest.raises(NodeRemoved):
        await left
    await change
    assert not stays.done()
    poll(fleet, "b")
    assert (await stays).name == "b"


async def test_routes_change_when_a_neuron_is_removed() -> None:
    """All routes to it are removed, and no others."""
    fleet = fleet_of("a", "b")
    poll(fleet, "a", "m", "n")
    poll(fleet, "b", "x")
    with contextlib.closing(RouteChanges(fleet)) as changes:
        configure(fleet, "b", "c")
        assert await changes.next() == {"m", "n"}


def test_a_neuron_keeps_its_state_at_a_new_endpoint() -> None:
    """A neuron at a new endpoint continues to serve; missed polls of the old endpoint do not count."""
    fleet = fleet_of("a")
    poll(fleet, "a", "m")
    fleet.record_miss("a", "old address")
    configure(fleet, "a", a="http://elsewhere")
    node = fleet.snapshot().nodes["a"]
    assert (node.endpoint, node.healthy, node.misses, node.last_error) == ("http://elsewhere", True, 0, None)
    assert list(node.models) == ["m"]


def test_a_drained_neuron_is_drained_when_it_is_added_again() -> None:
    """This holds at startup and later; for a neuron that is already configured the operator's last command counts."""
    fleet = Fleet([("a", "http://a"), ("b", "http://b")], unhealthy_after=3, drained=["a", "unknown"])
    assert [node.draining for node in fleet.snapshot().nodes.values()] == [True, False]
    fleet.set_draining("a", False)
    configure(fleet, "a", "b", "c", drained=("a", "c"))
    assert [node.draining for node in fleet.snapshot().nodes.values()] == [False, False, True]
