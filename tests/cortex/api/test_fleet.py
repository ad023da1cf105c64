"""`/v1/models`, `/fleet` and its events: a cached view equals a newly rendered one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cortex.api import models
from cortex.api.fleet import handlers
from cortex.api.fleet.changes import KEPT_CHANGES, FleetChanges, merge_patch
from cortex.api.fleet.view import MIN_INTERVAL_SECS, FleetView
from cortex.api.models import ModelList
from cortex.cli.live.followed import applied
from cortex.config.catalogue import Catalogue
from cortex.control.wiring import Parts
from cortex.fleet.state import Fleet
from shared.protocol import Device, Discovery, ModelView, NeuronHealth
from shared.tasks import first_of
from tests.cortex.api.keyed_fleet import key_entry, keyed_fleet
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

CATALOGUE = Catalogue.model_validate(
    {
        "models": [
            {"id": "small", "vram_mb": 4000},
            {"id": "large", "min_devices": 2},
            {"id": "pinned", "pinned_on": ["b"], "limit": {"context": 10}},
            {"id": "never", "min_devices": 9},
        ],
        "aliases": {"s": "small", "n": "never"},
    }
)
MODELS = ["small", "large", "pinned", "never", "only/there"]


def observed(fleet: Fleet, name: str, devices: int, models: dict[str, str], instance: str = "one") -> None:
    fleet.record_poll(
        name,
        started=float("inf"),
        health=NeuronHealth(),
        models=[ModelView(id=model, status=status) for model, status in models.items()],
        discovery=Discovery(
            devices=[Device(index=i, vram_total_mb=24000) for i in range(devices)],
            harnesses=["vllm"],
            instance_id=instance,
        ),
    )


@pytest.mark.parametrize("block", [1, 2, 64])
def test_cached_list_equals_a_new_one(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The cached list is right after each of many random changes: polls, events, deaths, restarts, other devices."""
    monkeypatch.setattr(models, "BLOCK", block)
    chance = random.Random(5)
    fleet, kept = Fleet([(name, f"http://{name}") for name in "abc"], unhealthy_after=1), ModelList()
    statuses = ["loaded", "loading", "failed", "unloaded"]
    for _ in range(400):
        name, model = chance.choice("abc"), chance.choice(MODELS)
        match chance.randrange(5):
            case 0:
                listed = {m: chance.choice(statuses) for m in chance.sample(MODELS, chance.randrange(4))}
                observed(fleet, name, chance.choice([1, 2]), listed, chance.choice(["one", "two"]))
            case 1:
                fleet.update_model(
                    name, ModelView(id=model, status=chance.choice(statuses), vram_used_mb=chance.choice([0, 5]))
                )
            case 2:
                fleet.remove_model(name, model)
            case 3:
                fleet.record_miss(name, "away")
            case _:
                fleet.set_draining(name, chance.choice([True, False]))
        snapshot = fleet.snapshot()
        blocks = kept.blocks(CATALOGUE, snapshot, created=7)
        assert json.loads(b"".join(blocks)) == json.loads(b"".join(ModelList().blocks(CATALOGUE, snapshot, created=7)))
        assert kept.blocks(CATALOGUE, snapshot, created=7) is blocks
    fewer = Catalogue(models=CATALOGUE.models[:1])
    assert kept.blocks(fewer, fleet.snapshot(), created=7) == ModelList().blocks(fewer, fleet.snapshot(), created=7)


def test_irrelevant_polls_keep_the_cached_list() -> None:
    """Device figures, a drain, and a restart with the same devices do not change the list."""
    fleet, kept = Fleet([("a", "http://a")], unhealthy_after=3), ModelList()
    observed(fleet, "a", 2, {"small": "loaded"})
    blocks = kept.blocks(CATALOGUE, fleet.snapshot(), created=7)
    health = NeuronHealth.model_validate({"devices": [{"index": 0, "vram_used_mb": 5}]})
    fleet.record_poll("a", started=float("inf"), health=health, models=None, discovery=None)
    fleet.set_draining("a", True)
    assert kept.blocks(CATALOGUE, fleet.snapshot(), created=7) is blocks
    observed(fleet, "a", 2, {"small": "loaded"}, instance="two")
    assert kept.blocks(CATALOGUE, fleet.snapshot(), created=7) == blocks


async def views(cortex: RunningCortex) -> AsyncIterator[dict[str, Any]]:
    """The events that a listener of `/fleet/events` gets."""
    async with cortex.http.get(f"{cortex.url}/fleet/events", timeout=aiohttp.ClientTimeout(sock_read=30)) as events:
        name = b""
        async for line in events.content:
            if line.startswith(b"event: "):
                name = line[7:].strip()
            elif line.startswith(b"data: "):
                assert name == b"fleet"
                yield json.loads(line[6:])


class Pauses:
    """In the place of the pauses between two events: each lasts until the test ends it."""

    def __init__(self) -> None:
        self.began = asyncio.Semaphore(0)
        self.ended = asyncio.Semaphore(0)

    async def pause(self, secs: float, closing: asyncio.Event) -> None:
        assert secs == MIN_INTERVAL_SECS
        self.began.release()
        await first_of({"end": self.ended.acquire(), "closing": closing.wait()})


async def test_first_change_is_sent_at_once_and_many_together(
    start_cortex: StartCortex, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current view, an event after the first change, and after a pause one for all changes in it."""
    pauses = Pauses()
    monkeypatch.setattr(handlers, "_closing_within", pauses.pause)
    cortex = await start_cortex([benjy], [], poll={"interval_secs": 30})
    fleet, heard = cortex.parts.fleet, views(cortex)
    assert (await anext(heard))["nodes"][0]["name"] == "benjy"
    pauses.ended.release()
    await pauses.began.acquire()
    fleet.update_model("benjy", ModelView(id="m", status="loading"))
    assert [model["status"] for model in (await anext(heard))["nodes"][0]["models"]] == ["loading"]
    await pauses.began.acquire()
    for told in range(100):
        fleet.update_model("benjy", ModelView(id="m", status="loading", vram_used_mb=told))
    fleet.update_model("benjy", ModelView(id="m", status="loaded"))
    pauses.ended.release()
    assert [model["status"] for model in (await anext(heard))["nodes"][0]["models"]] == ["loaded"]
    await heard.aclose()  # type: ignore[attr-defined]


def view_of(parts: Parts) -> FleetView:
    return FleetView(
        live=parts.live,
        fleet=parts.fleet,
        loader=parts.loader,
        scheduler=parts.scheduler,
        queue=parts.queue,
        counts=parts.counts,
        demand=parts.demand,
        storage=parts.storage,
    )


async def test_listeners_share_one_event(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It equals the answer of `GET /fleet`."""
    cortex = await start_cortex([benjy], [{"id": "m"}], aliases={"x": "m"}, poll={"interval_secs": 30})
    parts = cortex.parts
    view = view_of(parts)
    version, event = view.event()
    assert view.event()[1] is event
    assert version == cortex.parts.fleet.version
    shown = json.loads(event.removeprefix(b"event: fleet\ndata: "))
    async with cortex.http.get(f"{cortex.url}/fleet") as response:
        page = await response.json()
    assert {**page, "nodes": None} == {**shown, "nodes": None}
    assert page["models"][0]["id"] == "m"
    assert page["aliases"] == {"x": "m"}
    assert {**page["nodes"][0], "uptime_secs": 0} == {**shown["nodes"][0], "uptime_secs": 0}
    cortex.parts.fleet.set_draining("benjy", True)
    await until(lambda: view.event()[1] is not event)
    assert json.loads(view.event()[1].partition(b"data: ")[2])["nodes"][0]["draining"] is True


async def test_long_list_is_one_answer(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It has a length and is complete; HEAD gets only the head."""
    cortex = await start_cortex([benjy], [{"id": f"m{number}"} for number in range(3 * models.BLOCK)])
    async with cortex.http.get(f"{cortex.url}/v1/models") as response:
        assert response.content_type == "application/json"
        length = int(response.headers["Content-Length"])
        assert [entry["id"] for entry in (await response.json())["data"]] == [f"m{n}" for n in range(3 * models.BLOCK)]
    async with cortex.http.head(f"{cortex.url}/v1/models") as response:
        assert int(response.headers["Content-Length"]) == length


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": 1, "b": 2}, {"b": 2}, {"a": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a": {"c": 3}}),
        ({"a": {"b": 1}}, {"a": [1]}, {"a": [1]}),
        ({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": 1}, {"a": None}, {"a": None}),
    ],
)
def test_merge_patches(old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]) -> None:
    assert merge_patch(old, new) == patch


class Follower:
    """A listener of `/fleet/events?changes=true` that keeps the fleet up to date."""

    def __init__(self, cortex: RunningCortex) -> None:
        self._cortex = cortex
        self.fleet: dict[str, Any] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def run(self) -> None:
        url = f"{self._cortex.url}/fleet/events?changes=true"
        async with self._cortex.http.get(url, timeout=aiohttp.ClientTimeout(sock_read=30)) as events:
            name = ""
            async for line in events.content:
                if line.startswith(b"event: "):
                    name = line[7:].strip().decode()
                elif line.startswith(b"data: "):
                    data = json.loads(line[6:])
                    self.fleet = applied(self.fleet, data) if name == "change" else data
                    self.events.append((name, data))

    async def until_only(self, model: str) -> None:
        await until(lambda: [view["id"] for view in self.fleet["nodes"]["benjy"]["models"].values()] == [model])

    def status(self, node: str, model: str) -> str | None:
        found: str | None = (
            self.fleet.get("nodes", {}).get(node, {}).get("models", {}).get(f"{model}@{node}", {}).get("status")
        )
        return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.api.fleet.changes.TICK_SECS", 0.02)


@pytest.mark.usefixtures("quick")
async def test_listeners_follow_the_changes(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """After the whole fleet only what changed is sent; who applies it has what `/fleet` says, without its durations."""
    cortex = await start_cortex([benjy], [{"id": "m", "vram_mb": 7}], aliases={"x": "m"}, poll={"interval_secs": 30})
    fleet, first, second = cortex.parts.fleet, Follower(cortex), Follower(cortex)
    running = [asyncio.create_task(first.run())]
    await until(lambda: len(first.events) == 1)
    fleet.update_model("benjy", ModelView(id="m", status="loading"))
    await until(lambda: first.status("benjy", "m") == "loading")
    running.append(asyncio.create_task(second.run()))
    await until(lambda: second.status("benjy", "m") == "loading")
    for used in range(20):
        fleet.update_model("benjy", ModelView(id="m", status="loaded", vram_used_mb=used))
        await asyncio.sleep(0.005)
    fleet.update_model("benjy", ModelView(id="other", status="loaded"))
    fleet.remove_model("benjy", "m")
    for each in (first, second):
        await each.until_only("other")
        assert [name for name, _ in each.events] == ["fleet"] + ["change"] * (len(each.events) - 1)
    change = first.events[1][1]
    assert change.keys() == {"nodes"}
    assert change["nodes"].keys() == {"benjy"}
    assert change["nodes"]["benjy"].keys() == {"models"}
    assert applied({}, first.fleet) == applied({}, second.fleet)
    async with cortex.http.get(f"{cortex.url}/fleet") as response:
        whole = await response.json()
    node, told = first.fleet["nodes"]["benjy"], whole["nodes"][0]
    assert applied({}, node["devices"]) == applied({}, {str(each["index"]): each for each in told["devices"]})
    assert [view["id"] for view in node["models"].values()] == ["other"]
    assert [view["id"] for view in told["models"]] == ["other"]
    assert first.fleet["models"] == {each["id"]: each for each in whole["models"]}
    assert first.fleet["aliases"] == whole["aliases"]
    for task in running:
        task.cancel()
    await asyncio.wait(running)


@pytest.mark.usefixtures("quick")
async def test_a_listener_that_is_far_behind_gets_the_whole(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], [], poll={"interval_secs": 30})
    changes = FleetChanges(view_of(cortex.parts))
    with changes.listening():
        first, _ = changes.since(None)
        places = [first]
        for used in range(1, KEPT_CHANGES + 2):
            cortex.parts.fleet.update_model("benjy", ModelView(id="m", status="loaded", vram_used_mb=used))
            await changes.beyond(places[-1])
            places.append(changes.since(places[-1])[0])
        assert changes.since(places[1])[1].count(b"event: change") == KEPT_CHANGES
        assert changes.since(first)[1].startswith(b"event: fleet")
        assert changes.since(places[-1])[1] == b""
    await changes.close()


async def test_odd_query_of_events(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], [])
    async with cortex.http.get(f"{cortex.url}/fleet/events?changes=maybe") as response:
        assert response.status == 400
        assert "can be true or false" in (await response.json())["error"]["message"]


ALICE = {
    "revoked": "",
    "lower role": key_entry("alice", "user"),
    "new secret": key_entry("alice", "operator", key="sk-other"),
    "expired": key_entry("alice", "operator", expires="2026-01-01T00:00:00Z"),
}


@pytest.mark.parametrize("fate", ALICE)
@pytest.mark.parametrize("query", ["events", "events?changes=true", "logs?model=m&follow=true"])
async def test_a_stream_ends_with_its_key(
    start_cortex: StartCortex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, fate: str
) -> None:
    """At the next sign of life. The streams of other keys go on."""
    for name in ("handlers.KEEPALIVE_SECS", "logs.KEEP_ALIVE_SECS"):
        monkeypatch.setattr(f"cortex.api.fleet.{name}", 0.05)
    alice, bob = key_entry("alice", "operator"), key_entry("bob", "operator")
    async with keyed_fleet(start_cortex, tmp_path, bob, alice) as fleet:
        http, url = fleet.cortex.http, f"{fleet.cortex.url}/fleet/{query}"
        async with (
            http.get(url, headers={"Authorization": "Bearer sk-alice"}) as hers,
            http.get(url, headers={"Authorization": "Bearer sk-bob"}) as his,
        ):
            for events in (hers, his):
                while await events.content.readline() != b": keep-alive\n":
                    assert not events.content.at_eof()
            await fleet.use_keys(bob, ALICE[fate])
            rest = await hers.content.read()
            assert (b'"end":"the API key or session was revoked' in rest) == query.startswith("logs")
            his.content.read_nowait()
            while await his.content.readline() != b": keep-alive\n":
                assert not his.content.at_eof()


async def test_a_revoked_key_gets_no_more_lines(start_cortex: StartCortex, tmp_path: Path) -> None:
    """Not even those that come first after its end."""
    async with keyed_fleet(start_cortex, tmp_path, key_entry("alice", "operator")) as fleet:
        url, headers = f"{fleet.cortex.url}/fleet/logs?model=m&follow=true", {"Authorization": "Bearer sk-alice"}
        async with fleet.cortex.http.get(url, headers=headers) as lines:
            while b"starting" not in await lines.content.readline():
                assert not lines.content.at_eof()
            await fleet.use_keys(key_entry("bob", "operator"))
            fleet.benjy.more.set()
            assert b"secret" not in await lines.content.read()
