"""Real engines on real GPUs, loaded through a real neuron: memory by process, starts in turn, addresses, two GPUs.

Sleeping and sharing are in tests/e2e_vllm (`test_sleep_gpu.py`, `test_share_gpu.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from neuron.gpu.topology import TopologySource
from shared.protocol import Device
from tests.e2e_vllm.gpu import gpu_model, gpu_vllm, gpus, used_mb
from tests.neuron.conftest import mark
from tests.neuron.neurons import Answer, NeuronProcess, neuron_process

__all__ = ["gpu_model", "gpu_vllm", "gpus", "mark"]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LOAD_SECS = 400.0
SHARE = 0.25  # of a device, for each engine

Record = Callable[[str, object], None]


@dataclass
class Host:
    """A neuron on this host's GPUs."""

    neuron: NeuronProcess
    source: TopologySource
    model: Path

    async def devices(self) -> list[Device]:
        """Those that whole engines can use."""
        return [each for each in (await self.source.discover()).devices if each.usable and each.vram_total_mb]

    async def load(self, name: str, **fields: Any) -> Answer:
        body = {"model_id": name, "harness": "vllm", "source": str(self.model), **fields}
        return await self.neuron.call("POST", "/models/load", json=body, timeout=aiohttp.ClientTimeout(LOAD_SECS))

    async def unload(self, name: str) -> None:
        assert (await self.neuron.call("POST", "/models/unload", json={"model_id": name})).status == 200

    async def answers(self, name: str) -> bool:
        """Whether the engine answers a chat."""
        endpoint = (await self.neuron.endpoint(name)).body
        key = {"Authorization": f"Bearer {endpoint['api_key']}"} if endpoint["api_key"] else {}
        chat = {"model": name, "messages": [{"role": "user", "content": "The cat sees"}], "max_tokens": 4}
        async with self.neuron.session.post(
            f"{endpoint['url']}/v1/chat/completions", json=chat, headers=key
        ) as response:
            return response.status == 200


@pytest.fixture
async def host(gpus: TopologySource, gpu_vllm: Path, gpu_model: Path, tmp_path: Path, mark: str) -> AsyncIterator[Host]:
    config = tmp_path / "neuron.toml"
    config.write_text(
        f'port = 0\nstate_dir = "{tmp_path / "state"}"\n[[harnesses]]\nname = "vllm"\n[harness.vllm]\n'
        f"command = {json.dumps([str(gpu_vllm)])}\nspare = false\n"
        'extra_args = ["--enforce-eager", "--max-model-len", "512"]\nenv = { HF_HUB_OFFLINE = "1" }\n'
    )
    async with neuron_process(config) as neuron:
        found = Host(neuron, gpus, gpu_model)
        if not await found.devices():
            pytest.skip("no GPU here has memory of its own and is free of MIG")
        yield found


async def test_memory_is_measured_by_process_and_addressed_by_uuid(host: Host, record_property: Record) -> None:
    """On the last GPU: its processes are listed there and on no other, and hold what came into use; the engine sees the
    GPU by its UUID."""
    devices = await host.devices()
    device = devices[-1]
    before = await used_mb(host.source, device.index)
    answer = await host.load("test/last", devices=[device.index], vram_mb=int(device.vram_total_mb * SHARE))
    assert answer.status == 200, answer.body
    entry = await host.neuron.model("test/last")
    family = [psutil.Process(entry["pid"]), *psutil.Process(entry["pid"]).children(recursive=True)]
    held = {
        index: {pid: mb for pid, mb in processes.items() if pid in {each.pid for each in family}}
        for index, processes in (await host.source.process_memory_mb()).items()
    }
    came = await used_mb(host.source, device.index) - before
    record_property("MiB by process", held)
    record_property("MiB that came into use", came)
    record_property("MiB that neuron measured", entry["vram_used_mb"])
    assert {index for index, processes in held.items() if processes} == {device.index}, (
        "the driver lists none of its processes: does this run in a container without the host's process ids?"
    )
    assert abs(sum(held[device.index].values()) - came) < max(300, came * 0.1)
    assert entry["vram_used_mb"] == pytest.approx(came, rel=0.1, abs=300)
    visible = psutil.Process(entry["pid"]).environ()["CUDA_VISIBLE_DEVICES"]
    record_property("CUDA_VISIBLE_DEVICES", visible)
    assert visible in (device.uuid, str(device.index))  # the index for a vLLM that knows no UUIDs
    assert await host.answers("test/last")
    await host.unload("test/last")
    assert abs(await used_mb(host.source, device.index) - before) < 300


async def test_starts_on_one_gpu_take_turns(host: Host, record_property: Record) -> None:
    """Of two loads at the same moment the second has no process before the first one serves."""
    device = (await host.devices())[0]
    share = int(device.vram_total_mb * SHARE)
    names = ("test/first", "test/second")
    loads = [asyncio.create_task(host.load(name, devices=[device.index], vram_mb=share)) for name in names]
    together = 0
    while not all(load.done() for load in loads):
        listed = {name: await host.neuron.model(name) for name in names}
        starting = [name for name, each in listed.items() if each.get("pid") and each["status"] == "loading"]
        together = max(together, len(starting))
        await asyncio.sleep(0.05)
    assert [load.result().status for load in loads] == [200, 200], [load.result().body for load in loads]
    record_property("engines that started at the same time, at most", together)
    assert together == 1
    held = [(await host.neuron.model(name))["vram_used_mb"] for name in names]
    record_property("MiB held by each, wanted", [held, share])
    for name in names:
        assert await host.answers(name)
        await host.unload(name)


async def test_one_engine_on_two_gpus(host: Host, record_property: Record) -> None:
    """With tensor parallelism both hold about the same."""
    devices = await host.devices()
    if len(devices) < 2:
        pytest.skip("only one GPU here")
    least = min(device.vram_total_mb for device in devices)
    answer = await host.load("test/pair", tensor_parallel=2, vram_mb=int(2 * least * SHARE))
    assert answer.status == 200, answer.body
    entry = await host.neuron.model("test/pair")
    record_property("devices", entry["devices"])
    record_property("because", entry["placement"])
    assert len(entry["devices"]) == 2
    health = {each.index: each.vram_used_mb for each in (await host.source.read()).health}
    record_property("MiB used", {index: health[index] for index in entry["devices"]})
    assert await host.answers("test/pair")
    await host.unload("test/pair")
