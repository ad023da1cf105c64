"""Events: complete, in order, and bounded in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.gpu.simulated import SimulatedTopologySource
from neuron.lifecycle import engine_life
from neuron.lifecycle.events import QUEUE_LIMIT, EventHub
from tests.neuron.neurons import Neuron, config_of, neuron_here

MODEL = "org/model"


async def sse(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, int, Any]]:
    """(name, id, data) of each event."""
    fields: dict[str, str] = {}
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line and not line.startswith(":"):
            key, _, value = line.partition(": ")
            fields[key] = value
        elif fields:
            yield fields["event"], int(fields["id"]), json.loads(fields["data"])
            fields = {}


async def test_a_whole_life_in_events(neuron: Neuron) -> None:
    """The snapshot comes first, then every status in order with progress in between, numbered without gaps."""
    await neuron.load("other")
    async with neuron.session.get(f"{neuron.base}/events") as response:
        assert response.content_type == "text/event-stream"
        stream = sse(response)
        name, last, data = await anext(stream)
        assert name == "snapshot"
        assert [(model["id"], model["status"]) for model in data] == [("other", "loaded")]
        task = asyncio.create_task(neuron.load(MODEL, "--load-secs", "1", vram_mb=5000))
        states: list[str] = []
        phases: list[str] = []
        async for name, number, model in stream:
            assert (name, model["id"]) == ("model", MODEL)
            assert number == last + 1
            last = number
            if not states or states[-1] != model["state"]:
                states.append(model["state"])
            if model["progress"]:
                phases.append(model["progress"]["phase"])
            if model["state"] == "loaded" and model["vram_used_mb"]:
                assert model["vram_used_mb"] == 5000
                assert (await task).status == 200
                task = asyncio.create_task(neuron.unload(MODEL))
            if model["state"] == "unloaded":
                break
        assert (await task).status == 200
        assert states == ["starting", "loading", "loaded", "stopping", "unloaded"]
        assert "loading weights" in phases


async def test_loaded_is_told_before_its_memory_is_measured(neuron: Neuron, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits for this event: it comes with the endpoint while the driver still counts, and the memory
    follows in another one."""
    driver = asyncio.Event()
    measure = SimulatedTopologySource.process_memory_mb

    async def slowly(source: SimulatedTopologySource) -> Mapping[int, Mapping[int, int]]:
        await driver.wait()
        return await measure(source)

    monkeypatch.setattr(SimulatedTopologySource, "process_memory_mb", slowly)
    monkeypatch.setattr(engine_life, "_MEASURE_SECS", 60.0)
    async with neuron.session.get(f"{neuron.base}/events") as response:
        stream = sse(response)
        await anext(stream)
        load = asyncio.create_task(neuron.load(MODEL, vram_mb=5000))
        loaded = (model async for _, _, model in stream if model["state"] == "loaded")
        first = await asyncio.wait_for(anext(loaded), 20)
        assert first["endpoint"]["url"]
        assert first["vram_used_mb"] is None
        driver.set()
        assert (await asyncio.wait_for(anext(loaded), 20))["vram_used_mb"] == 5000
        answer = await load
        assert answer.body["url"] == first["endpoint"]["url"]


async def test_failure_is_an_event(neuron: Neuron) -> None:
    """A listener learns why a load failed."""
    async with neuron.session.get(f"{neuron.base}/events") as response:
        stream = sse(response)
        await anext(stream)
        task = asyncio.create_task(neuron.load(MODEL, "--fault", "oom-at-load"))
        async for _, _, model in stream:
            if model["status"] == "failed":
                assert "out of memory" in model["error"]
                break
        await task


async def test_stream_ends_with_neuron(mark: str, tmp_path: Path) -> None:
    """An open stream does not hold up the stop, and ends cleanly."""
    async with aiohttp.ClientSession() as session:
        async with neuron_here(config_of(tmp_path / "state", drain_timeout_secs=15)) as neuron:
            response = await session.get(f"{neuron.base}/events")
            await anext(sse(response))
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 5
        await response.read()


async def test_a_stop_is_told_for_every_engine(mark: str, tmp_path: Path) -> None:
    """A listener learns that no engine takes new requests before the stream ends, or it would send them some."""
    async with aiohttp.ClientSession() as session:
        async with neuron_here(config_of(tmp_path / "state", drain_timeout_secs=15)) as neuron:
            await asyncio.gather(*(neuron.load(f"org/{name}") for name in "abc"))
            response = await session.get(f"{neuron.base}/events")
            stream = sse(response)
            await anext(stream)
        assert {(model["id"], model["state"]) async for _, _, model in stream} >= {
            ("org/a", "draining"),
            ("org/b", "draining"),
            ("org/c", "draining"),
        }


async def test_slow_listener_is_dropped() -> None:
    """The queue of a slow listener is bounded; other listeners are not affected."""
    hub = EventHub()
    with hub.listening() as slow, hub.listening() as quick:
        for number in range(QUEUE_LIMIT + 5):
            hub.publish("model", str(number))
            event = await quick.next()
            assert event is not None
            assert event.data == str(number)
        assert await slow.next() is None
        assert not quick.dropped
