"""Unloads: answered only when everything is gone, in any order with loads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.neuron.neurons import Neuron, config_of, marked_engines, marked_processes, neuron_here

MODEL = "org/model"


async def test_unload_answers_after_memory_is_released(neuron: Neuron, mark: str) -> None:
    """When the unload answers: no process, no memory in use, no port reserved, no temporary files."""
    await neuron.load(MODEL, vram_mb=9000)
    answer = await neuron.unload(MODEL)
    assert (answer.status, answer.body["status"]) == (200, "unloaded")
    assert not marked_processes(mark)
    assert not neuron.reserved_ports
    assert not list(neuron.state_dir.glob("engines/*/tmp"))
    devices = (await neuron.call("GET", "/health")).body["devices"]
    assert [device["vram_used_mb"] for device in devices] == [0, 0]
    view = await neuron.model(MODEL)
    assert (view["status"], view["devices"], view["vram_used_mb"]) == ("unloaded", [], 0)
    assert [each["reason"] for each in view["transitions"][:2]] == ["stopped", "unload requested"]
    assert (await neuron.endpoint(MODEL)).status == 404


async def test_unload_of_a_model_that_is_not_loaded(neuron: Neuron) -> None:
    """404 for an unknown model, 200 for one that is already unloaded."""
    assert (await neuron.unload(MODEL)).error["code"] == "model_not_found"
    await neuron.load(MODEL)
    assert [(await neuron.unload(MODEL)).status for _ in range(2)] == [200, 200]


async def test_unload_clears_a_failure(neuron: Neuron) -> None:
    """Unloading a failed model clears its error; its log stays."""
    await neuron.load(MODEL, "--fault", "oom-at-load")
    assert (await neuron.unload(MODEL)).status == 200
    view = await neuron.model(MODEL)
    assert (view["status"], view["error"]) == ("unloaded", None)
    assert (await neuron.call("GET", f"/models/{MODEL}/logs")).body["lines"]


async def test_unload_ends_a_load(neuron: Neuron, mark: str) -> None:
    """Callers that wait for the load get the error at once, and the half-loaded engine is killed."""
    loading = asyncio.create_task(neuron.load(MODEL, "--load-secs", "30"))
    await neuron.until_status(MODEL, "loading")
    assert (await neuron.unload(MODEL)).status == 200
    answer = await loading
    assert (answer.status, answer.error["code"]) == (409, "load_cancelled")
    assert not marked_processes(mark)
    assert (await neuron.model(MODEL))["status"] == "unloaded"


async def test_load_during_a_stop_comes_after_it(neuron: Neuron, mark: str) -> None:
    """A load that arrives while the engine stops waits for the end, then loads with its own spec: never two engines."""
    await neuron.load(MODEL, "--fault", "ignore-sigterm")
    before = (await neuron.model(MODEL))["pid"]
    unloading = asyncio.create_task(neuron.unload(MODEL))
    await neuron.until_status(MODEL, "unloaded")
    assert (await neuron.model(MODEL))["state"] == "stopping"
    again, joined = await asyncio.gather(neuron.load(MODEL, quant="fp8"), neuron.load(MODEL, quant="fp8"))
    assert (again.status, joined.status, (await unloading).status) == (200, 200, 200)
    after = (await neuron.model(MODEL))["pid"]
    assert after != before
    assert marked_engines(mark) == [after]


async def test_unload_of_a_load_that_waits_for_a_stop(neuron: Neuron, mark: str) -> None:
    """Stopping, then loaded, then unloaded again: the load that had not started never starts."""
    await neuron.load(MODEL, "--fault", "ignore-sigterm")
    first = asyncio.create_task(neuron.unload(MODEL))
    await neuron.until_status(MODEL, "unloaded")
    waiting = asyncio.create_task(neuron.load(MODEL, quant="fp8", wait=True))
    await asyncio.sleep(0.1)  # the load is on its way; were it later than the unload, it would just load
    second = await neuron.unload(MODEL)
    assert (second.status, (await first).status) == (200, 200)
    assert (await waiting).error["code"] == "load_cancelled"
    assert not marked_processes(mark)


async def test_engine_that_ignores_sigterm_is_killed(neuron: Neuron, mark: str) -> None:
    """After stop_timeout_secs the whole session gets SIGKILL."""
    await neuron.load(MODEL, "--fault", "ignore-sigterm", "--fault", "spawn-child")
    started = time.monotonic()
    assert (await neuron.unload(MODEL)).status == 200
    assert 2 <= time.monotonic() - started < 8
    assert not marked_processes(mark)


async def test_helpers_that_stay_behind_are_swept(neuron: Neuron, mark: str) -> None:
    """A child that outlives the engine's clean exit and ignores SIGTERM is killed."""
    await neuron.load(MODEL, "--fault", "spawn-child")
    assert len(marked_processes(mark)) == 3  # its core, and the child
    await neuron.unload(MODEL)
    assert not marked_processes(mark)


async def test_loads_and_unloads_in_any_order(neuron: Neuron, mark: str) -> None:
    """Many loads and unloads at once: every caller gets an answer, at most one engine runs, and the state is
    correct."""
    orders = [neuron.unload(MODEL) if number % 3 == 2 else neuron.load(MODEL) for number in range(30)]
    answers = await asyncio.gather(*orders)
    assert {answer.status for answer in answers} <= {200, 404, 409}
    await neuron.load(MODEL)
    assert marked_engines(mark) == [(await neuron.model(MODEL))["pid"]]
    await neuron.unload(MODEL)
    assert not marked_processes(mark)


async def test_stop_of_neuron_ends_all_at_once(mark: str, tmp_path: Path) -> None:
    """Engines that stop slowly are stopped in parallel; loads get 503 before the drain."""
    async with neuron_here(config_of(tmp_path / "state", drain_timeout_secs=10)) as neuron:
        await asyncio.gather(*(neuron.load(model, "--fault", "ignore-sigterm") for model in "abcefg"))
        unloading = asyncio.create_task(neuron.unload("c"))
        await neuron.until_status("c", "unloaded")
        waiting = [
            asyncio.create_task(neuron.load("d", "--load-secs", "60")),
            asyncio.create_task(neuron.load("c", quant="fp8")),  # begins when "c" is gone
        ]
        await neuron.until_status("d", "loading")
        started = time.monotonic()
    assert time.monotonic() - started < 8  # six times stop_timeout_secs would be 12
    for answer in await asyncio.gather(*waiting):
        assert (answer.status, answer.error["code"]) == (503, "neuron_stopping")
        assert "Retry-After" in answer.headers
    assert (await unloading).status == 200
    assert not marked_processes(mark)
