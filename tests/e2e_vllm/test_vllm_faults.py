"""Real vLLM engines that share a device, are killed, and outlive their neuron."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.engine import session
from shared.system.process_stat import stat_of
from tests.e2e_vllm.conftest import RealVllm
from tests.neuron.neurons import Client, NeuronProcess, marked_processes, neuron_process, until
from tests.neuron.v1_cortex import v1_cortex

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

FIRST, SECOND = "test/first", "test/second"
LOAD_SECS = 180.0
SHARE_MB = 3000


def config(directory: Path, vllm: RealVllm) -> Path:
    """A host with one simulated GPU, about as large as this machine's memory, a share of which
    a vLLM for the CPU takes."""
    path = directory / "neuron.toml"
    path.write_text(
        f"""
port = 0
state_dir = "{directory / "state"}"
drain_timeout_secs = 20
[[harnesses]]
name = "vllm"
[harness.vllm]
command = {json.dumps(vllm.command)}
port_range = [27100, 27199]
extra_args = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512"]
env = {{ HF_HUB_OFFLINE = "1", VLLM_ENABLE_V1_MULTIPROCESSING = "0" }}
[simulate]
devices = ["RTX 4090"]
"""
    )
    return path


async def load(neuron: Client, model: str, vllm: RealVllm) -> int:
    body = {"model_id": model, "harness": "vllm", "source": str(vllm.tiny), "vram_mb": SHARE_MB}
    answer = await neuron.call("POST", "/models/load", json=body, timeout=aiohttp.ClientTimeout(LOAD_SECS))
    assert answer.status == 200, answer.body
    return answer.status


def shares(pids: set[int]) -> list[str]:
    """The engines' shares of the device, from their command lines."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids]
    return sorted(found[1] for line in lines if (found := re.search(r"--gpu-memory-utilization (\S+)", line)))


async def processes_of(neuron: Client, model: str) -> set[int]:
    pid = (await neuron.model(model))["pid"]
    return {each.pid for each in session.processes() if each.session == pid and each.alive}


async def stream(neuron: Client, model: str, began: asyncio.Event) -> list[Any]:
    found = (await neuron.endpoint(model)).body
    headers = {"Authorization": f"Bearer {found['api_key']}"}
    body = {"model": model, "prompt": "The cat", "max_tokens": 400, "ignore_eos": True, "stream": True}
    events: list[Any] = []
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(f"{found['url']}/v1/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
                began.set()
    return events


async def loads_two_at_once(neuron: NeuronProcess, vllm: RealVllm) -> None:
    """Two loads requested at once start one after the other on the device they share; both serve."""
    await asyncio.gather(load(neuron, FIRST, vllm), load(neuron, SECOND, vllm))
    both = await processes_of(neuron, FIRST) | await processes_of(neuron, SECOND)
    assert shares(both) == [f"{SHARE_MB * 10000 // 24564 / 10000:.4f}"] * 2
    steps = [step for model in (FIRST, SECOND) for step in (await neuron.model(model))["transitions"]]
    at = sorted((step["at"], step["state"]) for step in steps if step["state"] in ("loading", "loaded"))
    assert [state for _, state in at] == ["loading", "loaded", "loading", "loaded"]


async def comes_back_after_a_kill(neuron: NeuronProcess) -> None:
    """Only the API server is killed; its EngineCore would live on with all its memory."""
    family = await processes_of(neuron, FIRST)
    assert len(family) > 1
    pid = (await neuron.model(FIRST))["pid"]
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not any((each := stat_of(pid)) and each.alive for pid in family))
    assert time.monotonic() - killed_at < 5

    async def back() -> bool:
        entry = await neuron.model(FIRST)
        return bool(entry["status"] == "loaded" and entry["pid"] != pid)

    await until(back, timeout_secs=LOAD_SECS)


async def test_engines_share_a_device_and_outlive_every_death(mark: str, real_vllm: RealVllm, tmp_path: Path) -> None:
    """Two start at once, each with its share. One restarts when its server is killed. When neuron is killed with a
    stream in flight, the next one adopts both."""
    file = config(tmp_path, real_vllm)
    async with neuron_process(file) as first:
        await loads_two_at_once(first, real_vllm)
        await comes_back_after_a_kill(first)
        before = {model: (await first.model(model))["pid"] for model in (FIRST, SECOND)}
        began = asyncio.Event()
        streaming = asyncio.create_task(stream(first, SECOND, began))
        await began.wait()
        await first.stop(signal.SIGKILL)
        async with neuron_process(file) as second:
            for model, pid in before.items():
                entry = await second.until_status(model, "loaded")
                assert (entry["pid"], entry["vram_booked_mb"]) == (pid, SHARE_MB)
            events = await streaming
            assert events[-1] == b"[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            assert await second.stop() == 0
    assert not marked_processes(mark)


async def test_a_protocol_v1_cortex_needs_no_key(mark: str, real_vllm: RealVllm, tmp_path: Path) -> None:
    """It loads a model, and what it forwards is answered, also after the model was unloaded."""
    model, path = str(real_vllm.tiny), config(tmp_path, real_vllm)
    # Protocol v1 has no field for the memory that the engine may take.
    path.write_text(path.read_text().replace('"512"]', '"512", "--kv-cache-memory-bytes", "64M"]'))
    async with neuron_process(path) as neuron, v1_cortex(neuron) as cortex:
        assert (await cortex.load(model)).status == 200
        assert "[DONE]" in await cortex.forward(model, stream=True)
        await cortex.unload(model)
        assert "chat.completion" in await cortex.forward(model)
