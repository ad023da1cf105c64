"""Host memory for sleeping engines."""

from __future__ import annotations

import os

import pytest

from neuron.config import NeuronConfig
from neuron.harness.registry import HARNESSES
from neuron.memory.host_memory import HostMemory, check_sleep, host_memory, needed_mb, slept_mb
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


async def test_memory_of_a_real_host() -> None:
    """Available memory is at most the machine's, and the reserve is the configured one."""
    real = await host_memory(NeuronConfig.model_validate({"sleep": {"ram_reserve_mb": 7}}), taken_mb=0)
    assert real is not None
    assert 0 < real.available_mb <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert real.reserve_mb == 7


async def test_memory_of_a_simulated_host_is_configured() -> None:
    simulated = {"simulate": {"devices": ["RTX 4090"]}}
    assert await host_memory(NeuronConfig.model_validate(simulated), taken_mb=5) is None
    limited = NeuronConfig.model_validate({"simulate": {"devices": ["RTX 4090"], "ram_mb": 10_000}})
    assert await host_memory(limited, taken_mb=2_000) == HostMemory(8_000, 4_096)


async def test_check_before_a_sleep() -> None:
    """A simulated engine needs host memory only if that is simulated too; a real one always does."""
    real = NeuronConfig.model_validate({"sleep": {"ram_reserve_mb": 1 << 40}})
    assert await check_sleep(real, "m", sleeps_in_ram=False, weights_mb=5, vram_used_mb=9) == 0
    with pytest.raises(Conflict, match="m cannot sleep"):
        await check_sleep(real, "m", sleeps_in_ram=True, weights_mb=5, vram_used_mb=9)
    simulate = {"devices": ["RTX 4090"], "ram_mb": 6_000}
    limited = NeuronConfig.model_validate({"simulate": simulate, "sleep": {"ram_reserve_mb": 1_000}})
    assert await check_sleep(limited, "m", sleeps_in_ram=False, weights_mb=5_000, vram_used_mb=9_000) == 5_000
    with pytest.raises(Conflict):
        await check_sleep(limited, "m", sleeps_in_ram=False, weights_mb=5_000, vram_used_mb=9_000, taken_mb=1)


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
