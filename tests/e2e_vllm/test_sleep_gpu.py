"""Sleep mode on a real GPU: the driver counts the memory as free, and as used after waking. Skipped without a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import aiohttp
import pytest

from neuron.config import HarnessSettings
from neuron.gpu.topology import TopologySource
from neuron.harness.vllm.control import sleep_routes as sleeping
from tests.e2e_vllm.engine import API_KEY, CONTROL_KEY, MODEL, running_engine
from tests.e2e_vllm.gpu import gpu_model, gpu_vllm, gpus, used_mb

__all__ = ["gpu_model", "gpu_vllm", "gpus"]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SHARE = 0.3
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "The cat sees the moon"}], "max_tokens": 8}


async def test_memory_goes_and_comes_back(
    gpus: TopologySource, gpu_vllm: Path, gpu_model: Path, tmp_path: Path
) -> None:
    """Asleep it keeps less than a tenth of its memory; awake it gives the same answers, within seconds."""
    device = (await gpus.discover()).devices[0]
    settings = HarnessSettings(
        command=[str(gpu_vllm)],
        extra_args=["--enforce-eager", "--gpu-memory-utilization", str(SHARE)],
        env={"HF_HUB_OFFLINE": "1"},
        sleep_mode=True,
    )
    before = await used_mb(gpus, device.index)
    with running_engine(tmp_path, gpu_model, settings, devices=(device,)) as engine:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as http:
            assert await sleeping.is_guarded(http, engine.url, CONTROL_KEY)
            loaded = await used_mb(gpus, device.index) - before
            assert loaded > SHARE * device.vram_total_mb * 0.5
            await sleeping.sleep(http, engine.url, CONTROL_KEY)
            asleep = await used_mb(gpus, device.index) - before
            assert asleep < max(loaded * 0.1, 1500)  # a CUDA context, whatever the model
            began = time.monotonic()
            await sleeping.wake(http, engine.url, CONTROL_KEY)
            took = time.monotonic() - began
            assert took < 10
            assert abs(await used_mb(gpus, device.index) - before - loaded) < loaded * 0.05
            async with http.post(f"{engine.url}/v1/chat/completions", json=CHAT) as response:
                assert response.status == 200
            print(f"{loaded} MiB, asleep {asleep} MiB, awake again in {took:.2f} s")
