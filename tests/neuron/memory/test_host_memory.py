"""Host memory for sleeping engines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig
from neuron.gpu.discovery import topology_source
from neuron.harness.registry import HARNESSES
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.memory.host import with_host_ram
from neuron.memory.host_memory import HostMemory, needed_mb, slept_mb
from neuron.progress.history import LoadHistory
from shared.errors import Conflict


def test_weights_must_fit_beside_the_reserve() -> None:
    """The last MiB above the reserve may be used, and not one more."""
    HostMemory(available_mb=20_000, reserve_mb=4_000).check_fits("m", 16_000)
    for memory in (HostMemory(20_000, 4_001), HostMemory(19_999, 4_000), HostMemory(0, 0)):
        with pytest.raises(Conflict):
            memory.check_fits("m", 16_000)


def test_refusal_contains_the_figures() -> None:
    with pytest.raises(Conflict) as caught:
        HostMemory(19_000, 4_000).check_fits("org/model", 16_000)
    error = caught.value.body()["error"]
    assert (caught.value.status, error["code"]) == (409, "insufficient_ram")
    assert (error["needed_mb"], error["available_mb"], error["reserve_mb"]) == (16_000, 19_000, 4_000)
    for figure in ("org/model", "16000 MiB", "19000 MiB", "4000 MiB"):
        assert figure in error["message"]


@pytest.mark.parametrize(
    ("weights", "vram", "needed"),
    [(8_000, 20_000, 8_000), (None, 20_000, 20_000), (8_000, None, 8_000), (None, None, 0)],
)
def test_memory_needed_to_sleep(weights: int | None, vram: int | None, needed: int) -> None:
    """The weights, if the log says their size; at most what the engine holds."""
    assert needed_mb(weights, vram) == needed


@pytest.mark.parametrize(
    ("weights", "before", "after", "slept"),
    [(8_000, 20_000, 500, 8_000), (None, 20_000, 500, 19_500), (8_000, 20_000, 15_000, 5_000), (None, None, None, 0)],
)
def test_memory_taken_by_a_sleeping_engine(
    weights: int | None, before: int | None, after: int | None, slept: int
) -> None:
    """The estimate is the weights' size, bounded by the GPU memory that became free."""
    assert slept_mb(weights, before, after) == slept


@contextlib.asynccontextmanager
async def memory_of(tmp_path: Path, **settings: Any) -> AsyncIterator[EngineMemory]:
    config = NeuronConfig.model_validate(settings)
    source = with_host_ram(topology_source(config, tmp_path), config, tmp_path)
    try:
        yield EngineMemory(config, source, LoadHistory(None))
    finally:
        await source.close()


async def test_memory_of_a_real_host(tmp_path: Path) -> None:
    """Available memory is at most the machine's, and the reserve is the configured one."""
    async with memory_of(tmp_path, sleep={"ram_reserve_mb": 7}) as memory:
        real = await memory.host_memory()
    assert real is not None
    assert 0 < real.available_mb <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert real.reserve_mb == 7


async def test_memory_of_a_simulated_host_is_configured(tmp_path: Path) -> None:
    """Without `ram_mb` it is not counted. The reserve is at most an eighth."""
    async with memory_of(tmp_path, simulate={"devices": ["RTX 4090"]}) as memory:
        assert await memory.host_memory(taken_mb=5) is None
    async with memory_of(tmp_path, simulate={"devices": ["RTX 4090"], "ram_mb": 10_000}) as memory:
        assert await memory.host_memory(taken_mb=2_000) == HostMemory(8_000, 1_250)
    async with memory_of(tmp_path, simulate={"ram_mb": 64_000}) as memory:
        assert await memory.host_memory() == HostMemory(64_000, 4_096)


async def test_the_reserve_may_be_used_already(tmp_path: Path) -> None:
    """Then nothing more fits, so that spare processes are ended."""
    async with memory_of(tmp_path, sleep={"ram_reserve_mb": 1 << 30}) as memory:
        real = await memory.host_memory()
    assert real is not None
    assert not real.has_room(0)


def test_size_of_the_weights_in_the_log() -> None:
    """Every rank counts with the largest size that any rank reports."""
    lines = [
        "(Worker_TP0 pid=7) INFO 11-23 11:11:55 [model_runner.py:51] Model loading took 15.25 GiB memory and 3 s",
        "(Worker_TP1 pid=8) INFO 11-23 11:11:55 [model_runner.py:51] Model loading took 15.0 GiB memory and 3 s",
    ]
    for harness in HARNESSES.values():
        assert harness.sleep is not None
        assert harness.sleep.weights_mb(lines, 2) == 31232
        assert harness.sleep.weights_mb(lines[:1], 1) == 15616
        assert harness.sleep.weights_mb(["Loading weights took 3.1 seconds"], 1) is None
