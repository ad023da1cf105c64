"""Which waits a change of the fleet wakes, and what snapshots share: this keeps large fleets cheap."""

from __future__ import annotations

import asyncio
import contextlib

from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.fleet.state import Fleet, RouteChanges
from shared.protocol import Discovery, ModelActivity, ModelView, NeuronHealth

NAMES = ("c", "a", "b")


def make_fleet() -> Fleet:
    return Fleet([(name, f"http://{name}") for name in NAMES], unhealthy_after=1)


def poll(
    fleet: Fleet, name: str, *models: str, since: float = 1.0, busy: int = 0, uptime: float = 0, instance: str = "one"
) -> None:
    """A poll that began in the far future, so that it replaces every earlier report."""
    fleet.record_poll(
        name,
        started=float("inf"),
        health=NeuronHealth(uptime_secs=uptime, models=[ModelActivity(id=model, in_flight=busy) for model in models]),
        models=[ModelView(id=model, status="loaded", since=since) for model in models],
        discovery=Discovery(instance_id=instance),
    )


async def test_a_wait_for_one_neuron_is_not_woken_by_others() -> None:
    """A thousand listeners that wait for their neurons must not each look at every answer of every other."""
    fleet = make_fleet()
    looks = 0

    def healthy(node: NodeSnapshot) -> bool:
        nonlocal looks
        looks += 1
        return node.healthy

    waiting = asyncio.create_task(fleet.until("a", healthy))
    for _ in range(50):
        poll(fleet, "b", "m")
        await asyncio.sleep(0)
    assert looks == 1
    poll(fleet, "a", "m")
    assert (await waiting).healthy
    assert looks == 2


async def test_a_cancelled_wait_does_not_affect_others() -> None:
    """Cancelling one of two waits for a neuron leaves the second as it was."""
    fleet = make_fleet()
    first = asyncio.create_task(fleet.until("a", lambda node: node.healthy))
    second = asyncio.create_task(fleet.until("a", lambda node: node.healthy))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    poll(fleet, "a")
    assert (await second).name == "a"


async def test_polls_without_route_changes_wake_no_listener() -> None:
    """Uptime changes with every poll, routes do not."""
    fleet = make_fleet()
    poll(fleet, "a", "m", "other")
    with contextlib.closing(RouteChanges(fleet)) as changes:
        for uptime in range(1, 20):
            poll(fleet, "a", "m", "other", uptime=uptime)
        hearing = asyncio.create_task(changes.next())
        await asyncio.sleep(0)
        assert not hearing.done()
        fleet.update_model("a", ModelView(id="m", status="unloaded", since=2.0))
        assert await hearing == {"m"}


async def test_changes_that_affect_routing_are_reported() -> None:
    """A reload, work that the engine reports, a new process, a drain, a death, a model that came or went."""
    fleet = make_fleet()
    poll(fleet, "a", "m")
    with contextlib.closing(RouteChanges(fleet)) as changes:
        poll(fleet, "a", "m", since=2.0)
        assert await changes.next() == {"m"}
        poll(fleet, "a", "m", since=2.0, busy=3)
        assert await changes.next() == {"m"}
        poll(fleet, "a", "m", since=2.0, busy=3, instance="two")
        assert await changes.next() == {"m"}
        fleet.set_draining("a", True)
        assert await changes.next() == {"m"}
        fleet.update_model("a", ModelView(id="new", status="loaded", since=1.0))
        assert await changes.next() == {"new"}
        fleet.remove_model("a", "m")
        assert await changes.next() == {"m"}
        fleet.record_miss("a", "gone")
        assert await changes.next() == {"new"}


async def test_without_since_any_change_of_the_listing_may_be_a_reload() -> None:
    """Protocol v1: the entry looks alike afterwards, and an engine's port may be another model's."""
    fleet = make_fleet()
    for model_id in ("m", "n"):
        fleet.update_model("a", ModelView(id=model_id, status="loaded"))
    with contextlib.closing(RouteChanges(fleet)) as changes:
        fleet.update_model("a", ModelView(id="m", status="loaded", devices=[1]))
        assert await changes.next() == {"m"}
        fleet.update_model("a", ModelView(id="n", status="unloaded"))
        assert await changes.next() == {"m", "n"}


def test_holders_stay_true_as_models_come_and_go() -> None:
    """The index that is carried along says what a search through all neurons would, in the configuration's order."""
    fleet = make_fleet()
    poll(fleet, "b", "m", "n")
    poll(fleet, "c", "m")
    poll(fleet, "a", "m", "x")
    before = fleet.snapshot()
    poll(fleet, "c", "n")
    fleet.remove_model("a", "x")
    fleet.update_model("c", ModelView(id="y", status="loading"))
    after = fleet.snapshot()
    for snapshot in (before, after):
        searched = FleetSnapshot(snapshot.nodes)
        assert sorted(snapshot.listed_models) == sorted(searched.listed_models)
        for model in ("m", "n", "x", "y"):
            assert snapshot.holders(model) == searched.holders(model)
    assert [node.name for node in before.holders("m")] == ["c", "a", "b"]
    assert after.holders("x") == ()
