"""Draining: what happens to running requests when an engine is to stop. With real processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.neuron.lasting import MODEL, config, leaving, streaming
from tests.neuron.neurons import marked_processes, neuron_process

__all__ = ["config"]


async def test_drain_finishes_what_runs(config: Path, mark: str) -> None:
    """unload?drain_secs=: the endpoint is withdrawn, the running stream finishes, then the engine stops."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=30) as stream:
            path = "/models/unload?drain_secs=60"
            unloading = asyncio.create_task(neuron.call("POST", path, json={"model_id": MODEL}))
            view = await neuron.until_status(MODEL, "unloaded")
            assert view["state"] == "draining"
            assert (await neuron.endpoint(MODEL)).status == 404
            assert (await stream)[-1] == b"[DONE]"
            assert (await unloading).status == 200
        assert [step["state"] for step in (await neuron.model(MODEL))["transitions"]][:3] == [
            "unloaded",
            "stopping",
            "draining",
        ]
        assert (await neuron.call("POST", "/models/unload?drain_secs=x", json={"model_id": MODEL})).status == 400


async def test_drain_is_cut_short(config: Path, mark: str) -> None:
    """A drain ends at its deadline, and at an unload without one."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "5")
        async with streaming(neuron, tokens=1000):
            body = {"model_id": MODEL}
            long = asyncio.create_task(neuron.call("POST", "/models/unload?drain_secs=3000", json=body))
            await neuron.until_status(MODEL, "unloaded")
            assert (await neuron.unload(MODEL)).status == 200
            assert (await long).status == 200


async def test_sigterm_drains_and_sends_events(config: Path, mark: str) -> None:
    """When neuron stops, listeners get an event that the model takes no new requests before their stream ends, and
    running requests finish."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=40) as stream, neuron.session.get(f"{neuron.base}/events") as events:
            assert events.status == 200
            neuron.process.terminate()
            text = (await events.content.read()).decode()
            told = [line[6:] for line in text.splitlines() if line.startswith('data: {"id"')]
            states = [json.loads(each)["state"] for each in told]
            assert states[:1] == ["draining"]
            assert (await stream)[-1] == b"[DONE]"
        assert await asyncio.wait_for(neuron.process.wait(), 20) == 0
    assert not marked_processes(mark)


async def test_drain_goes_on_when_engines_are_left(config: Path, mark: str) -> None:
    """SIGTERM with leave_engines does not cut the requests of a model that is being unloaded."""
    leaving(config)
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=40) as stream:
            unload = asyncio.create_task(neuron.call("POST", "/models/unload?drain_secs=30", json={"model_id": MODEL}))
            await neuron.until_status(MODEL, "unloaded")
            assert await neuron.stop() == 0
            assert len(events := await stream) >= 40
            assert events[-1] == b"[DONE]"
        assert (await unload).status == 200
    assert not marked_processes(mark)
