"""Two real engines on one real GPU: neuron reports what the driver counts. Skipped without a GPU."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from neuron.gpu.topology import TopologySource
from tests.e2e_vllm.gpu import gpu_model, gpu_vllm, gpus, used_mb
from tests.neuron.conftest import mark
from tests.neuron.neurons import Answer, NeuronProcess, neuron_process

__all__ = ["gpu_model", "gpu_vllm", "gpus", "mark"]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

FIRST, SECOND = "test/first", "test/second"
SHARE = 0.35  # of the device, for each engine
LOAD_SECS = 400.0


async def load(neuron: NeuronProcess, model: str, source: Path, vram_mb: int) -> Answer:
    body = {"model_id": model, "harness": "vllm", "source": str(source), "vram_mb": vram_mb, "devices": [0]}
    return await neuron.call("POST", "/models/load", json=body, timeout=aiohttp.ClientTimeout(LOAD_SECS))


async def test_two_engines_share_a_gpu(
    gpus: TopologySource, gpu_vllm: Path, gpu_model: Path, tmp_path: Path, mark: str
) -> None:
    """Requested at the same moment both start, each within its share as the driver measures it. A third is refused
    with the figures. Afterwards all memory is free."""
    device = (await gpus.discover()).devices[0]
    before = await used_mb(gpus, device.index)
    wanted = int(device.vram_total_mb * SHARE)
    config = tmp_path / "neuron.toml"
    config.write_text(
        f"""
port = 0
state_dir = "{tmp_path / "state"}"
[[harnesses]]
name = "vllm"
[harness.vllm]
command = {json.dumps([str(gpu_vllm)])}
extra_args = ["--enforce-eager", "--max-model-len", "512"]
env = {{ HF_HUB_OFFLINE = "1" }}
"""
    )
    async with neuron_process(config) as neuron:
        answers = await asyncio.gather(*(load(neuron, model, gpu_model, wanted) for model in (FIRST, SECOND)))
        assert [answer.status for answer in answers] == [200, 200], [answer.body for answer in answers]
        held = [(await neuron.model(model))["vram_used_mb"] for model in (FIRST, SECOND)]
        assert all(wanted * 0.5 < mb < wanted * 1.1 for mb in held), (held, wanted)
        assert abs(await used_mb(gpus, device.index) - before - sum(held)) < device.vram_total_mb * 0.03
        refused = await load(neuron, "test/third", gpu_model, wanted)
        assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
        for model in (FIRST, SECOND):
            assert (await neuron.call("POST", "/models/unload", json={"model_id": model})).status == 200
        assert abs(await used_mb(gpus, device.index) - before) < 300
        print(f"{wanted} MiB wanted by each of two, held {held}")
