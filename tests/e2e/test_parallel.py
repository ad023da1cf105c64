"""A model split by tensor, pipeline and data parallelism on a simulated host with eight GPUs, with real processes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cortex.cortex_process import CortexProcess, cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, until
from tests.ports import free_port

__all__ = ["mark"]

SPLIT, SMALL = "org/split", "org/small"
PARALLEL = {"tensor": 2, "pipeline": 2, "data": 2, "expert": True}
MODELS: list[dict[str, Any]] = [
    {"id": SPLIT, "harness": "sim", "vram_mb": 400_000, "parallel": {**PARALLEL}},
    {"id": SMALL, "harness": "sim", "vram_mb": 20_000},
    {"id": "org/wide", "harness": "sim", "parallel": {"tensor": 8, "data": 2}},
]
CONFIG = """
name = "n"
port = {port}
state_dir = "{directory}/state"
[[harnesses]]
name = "sim"
[harness.sim]
extra_args = ["--load-secs", "0.2"]
port_range = [28600, 28649]
[simulate]
devices = ["H100", "H100", "H100", "H100", "H100", "H100", "H100", "H100"]
"""


@dataclass
class Host:
    """cortex and a neuron on a host with eight GPUs."""

    session: aiohttp.ClientSession
    cortex: CortexProcess
    neuron: NeuronProcess
    config: Path

    async def get(self, path: str) -> Any:
        async with self.session.get(self.cortex.url + path) as response:
            return await response.json()

    async def ask(self, model: str) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 4}
        async with self.session.post(f"{self.cortex.url}/v1/completions", json=body) as response:
            await response.read()
            return response.status

    async def used_mb(self) -> list[int]:
        [node] = (await self.get("/fleet"))["nodes"]
        return [device["vram_used_mb"] for device in node["devices"]]

    async def until_used(self, mb: list[int]) -> None:
        async def reached() -> bool:
            return await self.used_mb() == mb

        await until(reached)


@pytest.fixture
async def host(mark: str, tmp_path: Path) -> AsyncIterator[Host]:
    port = free_port()
    config = tmp_path / "neuron.toml"
    config.write_text(CONFIG.format(port=port, directory=tmp_path), encoding="utf-8")
    address = neuron_at(port)
    async with (
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [address], MODELS) as cortex,
        aiohttp.ClientSession() as session,
    ):
        yield Host(session, cortex, neuron, config)


async def load(neuron: NeuronProcess, model: str, **fields: Any) -> tuple[int, str]:
    """The status of the answer, and what it says."""
    async with neuron.session.post(f"{neuron.base}/models/load", json={"model_id": model, **fields}) as response:
        body = await response.json()
        return response.status, body["error"]["message"] if "error" in body else body["status"]


async def test_eight_devices_for_one_engine(host: Host) -> None:
    """The first request loads it: two copies of two stages of two devices, one engine with vLLM's flags, an equal part
    of the memory on each device. Every view shows it. What fits beside it is loaded beside it."""
    plan = (await host.get(f"/fleet/explain?model={SPLIT}"))["decision"]
    assert (plan["devices"], plan["tensor_parallel"], plan["parallel"]) == (list(range(8)), 2, PARALLEL)
    assert plan["vram_mb_per_device"] == 50_000
    assert "tensor groups 0+1, 2+3, 4+5, 6+7 connected by phb" in plan["devices_because"]
    assert await host.ask(SPLIT) == 200
    await host.until_used([50_000] * 8)
    entry = await host.neuron.model(SPLIT)
    assert (entry["devices"], entry["tensor_parallel"], entry["parallel"]) == (list(range(8)), 2, PARALLEL)
    assert entry["vram_booked_mb"] == 400_000
    words = psutil.Process(entry["pid"]).cmdline()
    start = words.index("--tensor-parallel-size")
    assert words[start : start + 7] == [
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--data-parallel-size", "2"),
        "--enable-expert-parallel",
    ]
    listed = {each["id"]: each for each in (await host.get("/v1/models"))["data"]}
    assert listed[SPLIT]["parallel"] == listed[SPLIT]["locations"][0]["parallel"] == PARALLEL
    assert "parallel" not in listed[SMALL]
    assert "org/wide" not in listed  # sixteen devices
    [node] = (await host.get("/fleet"))["nodes"]
    assert node["models"][0]["parallel"] == PARALLEL
    status = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex", "status", "--url", host.cortex.url), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await status.communicate()
    assert f"{SPLIT} on 0 1 2 3 4 5 6 7 (loaded, tensor 2 x pipeline 2 x data 2, expert)" in printed.decode()
    assert await host.ask(SMALL) == 200
    await host.until_used([70_000, *[50_000] * 7])


async def test_the_next_neuron_adopts_it(host: Host) -> None:
    """After kill -9 it has the same split, and a load with another one is refused."""
    assert await host.ask(SPLIT) == 200
    before = await host.neuron.model(SPLIT)
    await host.neuron.stop(signal.SIGKILL)
    async with neuron_process(host.config) as second:
        after = await second.until_status(SPLIT, "loaded")
        for field in ("pid", "devices", "parallel", "vram_booked_mb"):
            assert after[field] == before[field]
        again = await load(second, SPLIT, vram_mb=400_000, parallel=PARALLEL)
        assert again == (200, "loaded")
        status, reason = await load(second, SPLIT, vram_mb=400_000, parallel={"tensor": 2, "pipeline": 4})
        assert status == 409
        assert "parallel is tensor 2 x pipeline 2 x data 2, expert, asked for tensor 2 x pipeline 4 x data 1" in reason
        assert (await second.unload(SPLIT)).status == 200
        assert await load(second, SPLIT) == (200, "loaded")  # by its id alone: the split is remembered
        assert (await second.model(SPLIT))["parallel"] == PARALLEL


async def test_refused_loads(host: Host) -> None:
    """What contradicts is named: an argument, the tensor-parallel size, the number of devices here."""
    for fields, param in (
        ({"args": ["--data-parallel-size-local=1"], "parallel": {"data": 2}}, "args"),
        ({"tensor_parallel": 4, "parallel": {"tensor": 2}}, "tensor_parallel"),
        ({"parallel": {"tensor": 8, "data": 2}}, "parallel"),
        ({"parallel": {"pipeline": 0}}, "parallel.pipeline"),
        ({"parallel": {"pipeline": 2}, "devices": [0, 1, 2]}, "devices"),
    ):
        body = {"model_id": "org/x", "harness": "sim", **fields}
        async with host.neuron.session.post(f"{host.neuron.base}/models/load", json=body) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["param"]) == (400, param), answer
