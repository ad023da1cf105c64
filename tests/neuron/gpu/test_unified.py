"""A GPU that shares the host's RAM, as NVML shows it on a GB10: it answers NOT_SUPPORTED to questions about memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuron.memory.ram import host_ram
from tests.neuron.gpu.test_serve_nvml import configuration, environment
from tests.neuron.neurons import Client, config_of, neuron_here, neuron_process
from tests.neuron.recording_vllm import calls
from tests.nvml.library import Gpu, write_scenario

GB10 = Gpu(name="NVIDIA GB10", figures={"total": None})
RAM_MB = 122_570


async def share_of(neuron: Client, directory: Path, **command: Any) -> float:
    """What the engine is told to take, as a part of the memory."""
    answer = await neuron.call("POST", "/models/load", json={"harness": "vllm", **command})
    assert answer.status == 200, answer.body
    arguments, _ = calls(directory)[-1]
    return float(arguments[arguments.index("--gpu-memory-utilization") + 1])


async def test_its_memory_is_the_hosts(library: dict[str, str], tmp_path: Path) -> None:
    """Total, free and bookable; each vLLM gets its share and never 92 %; what does not fit is refused."""
    scenario = write_scenario(tmp_path / "gpus", (GB10,))
    async with neuron_process(configuration(tmp_path), env=environment(library, scenario)) as neuron:
        discovery = (await neuron.call("GET", "/discovery")).body
        (device,), total = discovery["devices"], host_ram().total_mb
        assert (device["unified"], device["vram_total_mb"]) == (True, total)
        assert discovery["host"]["ram_total_mb"] == total
        before = (await neuron.call("GET", "/health")).body
        (live,) = before["devices"]
        assert live["vram_free_mb"] == before["host"]["ram_free_mb"]
        assert 0 < live["vram_bookable_mb"] < live["vram_free_mb"]
        assert await share_of(neuron, tmp_path, model_id="sized", vram_mb=700) == pytest.approx(700 / total, abs=1e-3)
        unknown = await share_of(neuron, tmp_path, model_id="unknown")
        assert 0.1 < unknown <= 0.5
        after = (await neuron.call("GET", "/health")).body
        assert after["devices"][0]["vram_booked_mb"] == after["host"]["ram_booked_mb"] >= 700 + 0.1 * total
        assert (await neuron.call("GET", "/models")).body[0]["ram_used_mb"] > 0
        refused = await neuron.call(
            "POST", "/models/load", json={"model_id": "huge", "harness": "vllm", "vram_mb": total}
        )
        assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
        on_cpu = {"model_id": "on-cpu", "harness": "vllm", "vram_mb": total, "devices": []}
        assert (await neuron.call("POST", "/models/load", json=on_cpu)).error["code"] == "insufficient_ram"


async def test_one_capacity_for_gpu_cpu_and_sleeping_models(tmp_path: Path) -> None:
    """A simulated one: whatever takes memory, the others have less, and a model that sleeps keeps its weights."""
    config = config_of(tmp_path / "state", simulate={"devices": ["GB10"]})
    async with neuron_here(config) as neuron:

        async def bookable() -> set[int]:
            figures = (await neuron.call("GET", "/health")).body
            return {figures["devices"][0]["vram_bookable_mb"], figures["host"]["ram_bookable_mb"]}

        empty = RAM_MB - 4096
        assert await bookable() == {empty}
        await neuron.load("gpu", vram_mb=40_000)
        assert await bookable() == {empty - 40_000}
        assert (await neuron.load("cpu", vram_mb=30_000, devices=[])).status == 200
        assert await bookable() == {empty - 70_000}
        refused = await neuron.load("second", vram_mb=60_000, devices=[0])
        assert refused.error["code"] == "insufficient_vram"
        assert (await neuron.call("POST", "/models/sleep", json={"model_id": "gpu"})).status == 200
        asleep = await neuron.model("gpu")
        assert asleep["slept_mb"] > 0
        assert await bookable() == {empty - 30_000 - asleep["vram_booked_mb"] - asleep["slept_mb"]}
        assert (await neuron.call("POST", "/models/wake", json={"model_id": "gpu"})).status == 200
        await neuron.unload("gpu")
        await neuron.unload("cpu")
        assert await bookable() == {empty}
