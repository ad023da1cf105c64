"""A real GPU and a vLLM for it. Tests that need them are skipped without."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from neuron.config import NeuronConfig
from neuron.gpu.discovery import topology_source
from neuron.gpu.topology import TopologySource
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.models import tiny_qwen3
from tests.environment.vllm import VllmEnvironment

COMMAND_VARIABLE = "CORTEX_TEST_GPU_VLLM"
"""The `vllm` of an environment whose vLLM was built for the GPU; default: the one on PATH."""


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
def gpu_vllm(gpus: TopologySource) -> Path:
    """Its `vllm` executable."""
    found = os.environ.get(COMMAND_VARIABLE) or shutil.which("vllm")
    if found is None:
        pytest.skip(f"no vLLM for GPUs: neither {COMMAND_VARIABLE} nor a vllm on PATH")
    return Path(found)


@pytest.fixture
def gpu_model(gpu_vllm: Path) -> Path:
    """A small model, made with the libraries of that vLLM."""
    try:
        return tiny_qwen3(VllmEnvironment(gpu_vllm.with_name("python")))
    except EnvironmentUnavailable as error:
        pytest.skip(f"no model: {error}")


async def used_mb(source: TopologySource, index: int) -> int:
    """MiB of a device that the driver counts as used, by any process."""
    return next(device.vram_used_mb for device in (await source.read()).health if device.index == index)
