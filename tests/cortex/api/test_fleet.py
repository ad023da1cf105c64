"""`/v1/models`, `/fleet` and its events: a cached view equals a newly rendered one."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from cortex.api import models
from cortex.api.fleet_view import MIN_INTERVAL_SECS, FleetView
from cortex.api.models import ModelList
from cortex.config.catalogue import Catalogue
from cortex.fleet.state import Fleet
from shared.protocol import Device, Discovery, ModelView, NeuronHealth
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


async def test_first_change_is_sent_at_once_and_many_together(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The current view, an event after the first change, and a few per second under constant change; the last event has
    the last change."""
    cortex = await start_cortex([benjy], [], poll={"interval_secs": 30})
    fleet, heard = cortex.parts.fleet, views(cortex)
    assert (await anext(heard))["nodes"][0]["name"] == "benjy"
    await asyncio.sleep(2 * MIN_INTERVAL_SECS)
    began = time.monotonic()
    fleet.update_model("benjy", ModelView(id="m", status="loading"))
    assert [model["status"] for model in (await anext(heard))["nodes"][0]["models"]] == ["loading"]
    assert time.monotonic() - began < MIN_INTERVAL_SECS
    told = 0
    while time.monotonic() - began < 1.0:
        told += 1
        fleet.update_model("benjy", ModelView(id="m", status="loading", vram_used_mb=told))
        await asyncio.sleep(0.005)
    fleet.update_model("benjy", ModelView(id="m", status="loaded"))
    count, last = 0, ""
    while last != "loaded":
        count, last = count + 1, (await anext(heard))["nodes"][0]["models"][0]["status"]
    assert count <= 1.5 / MIN_INTERVAL_SECS
    await heard.aclose()  # type: ignore[attr-defined]


async def test_listeners_share_one_event(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It equals the answer of `GET /fleet`."""
    cortex = await start_cortex([benjy], [{"id": "m"}], aliases={"x": "m"}, poll={"interval_secs": 30})
    parts = cortex.parts
    view = FleetView(
        live=parts.live,
        fleet=parts.fleet,
        loader=parts.loader,
        scheduler=parts.scheduler,
        queue=parts.queue,
        counts=parts.counts,
    )
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
