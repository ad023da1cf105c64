"""Sleep mode on a real GPU: the memory that the driver counts goes, and comes back. Skipped where there is none."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from neuron import sleeping
from neuron.config import HarnessSettings, NeuronConfig
from neuron.discover import topology_source
from neuron.topology import TopologySource
from tests.e2e_vllm.engine import API_KEY, CONTROL_KEY, MODEL, running_engine
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.models import tiny_qwen3
from tests.environment.vllm import VllmEnvironment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

COMMAND_VARIABLE = "CORTEX_TEST_GPU_VLLM"
"""The `vllm` of an environment whose vLLM was built for the GPU; without it the one on PATH."""
SHARE = 0.3
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "The cat sees the moon"}], "max_tokens": 8}


@pytest.fixture
async def gpus(tmp_path: Path) -> AsyncIterator[TopologySource]:
    source = topology_source(NeuronConfig(), tmp_path)
    try:
        if not (await source.discover()).has_gpu:
            pytest.skip("no NVIDIA GPU here")
        yield source
    finally:
        await source.close()


@pytest.fixture
def command(gpus: TopologySource) -> Path:
    found = os.environ.get(COMMAND_VARIABLE) or shutil.which("vllm")
    if found is None:
        pytest.skip(f"no vLLM for GPUs: neither {COMMAND_VARIABLE} nor a vllm on PATH")
    return Path(found)


async def used_mb(source: TopologySource, index: int) -> int:
    return next(device.vram_used_mb for device in await source.health() if device.index == index)


async def test_memory_goes_and_comes_back(gpus: TopologySource, command: Path, tmp_path: Path) -> None:
    """Asleep less than a tenth of what it took is left; awake it answers as before, within seconds."""
    device = (await gpus.discover()).devices[0]
    try:
        model = tiny_qwen3(VllmEnvironment(command.with_name("python")))
    except EnvironmentUnavailable as error:
        pytest.skip(f"no model: {error}")
    settings = HarnessSettings(
        command=[str(command)],
        extra_args=["--enforce-eager", "--gpu-memory-utilization", str(SHARE)],
        env={"HF_HUB_OFFLINE": "1"},
        sleep_mode=True,
    )
    before = await used_mb(gpus, device.index)
    with running_engine(tmp_path, model, settings, devices=(device,)) as engine:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {API_KEY}"}) as http:
            assert await sleeping.obeys_only_us(http, engine.url, CONTROL_KEY)
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
