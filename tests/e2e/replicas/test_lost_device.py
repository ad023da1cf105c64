"""A GPU falls off the bus of a host with four instances: real processes, real nvidia-ml-py, a test library."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.e2e.replicas.fleet import Hosts
from tests.neuron.conftest import mark
from tests.neuron.neurons import REPOSITORY, neuron_process, until
from tests.nvml.library import GPU_IS_LOST, Gpu, build_library, write_scenario
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/small"
GPUS = 6


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_library(tmp_path_factory.getbasetemp() / "nvml")


def config_file(directory: Path, port: int) -> Path:
    """ "vllm" is the simulated engine."""
    program = directory / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'neuron.sim', *sys.argv[1:], '--load-secs', '0'])\n"
    )
    program.chmod(0o755)
    path = directory / "neuron.toml"
    path.write_text(
        f'name = "a"\nport = {port}\nstate_dir = "{directory / "state"}"\n[[harnesses]]\nname = "vllm"\n'
        f'[harness.vllm]\ncommand = ["{program}"]\nport_range = [29200, 29299]\nspare = false\n'
        "[recovery]\nbackoff_secs = 0.2\n"
    )
    return path


async def test_a_lost_device_takes_only_its_instance(mark: str, library: dict[str, str], tmp_path: Path) -> None:
    """The instance comes back on a device that was free, the others keep running."""
    scenario = write_scenario(tmp_path / "gpus", (Gpu(),) * GPUS)
    environment = {**library, **scenario, "PYTHONPATH": str(REPOSITORY)}
    port = free_port()
    model = {"id": MODEL, "harness": "vllm", "vram_mb": 20_000, "replicas": {"min": 4}}
    async with (
        neuron_process(config_file(tmp_path, port), env=environment) as neuron,
        cortex_process(tmp_path, [neuron_at(port, "a")], [model]) as cortex,
        aiohttp.ClientSession() as session,
    ):
        hosts = Hosts(session, tmp_path, cortex, {"a": neuron})
        before = {each["devices"][0]: each["pid"] for each in await hosts.until_loaded(MODEL, 4)}
        assert sorted(before) == [0, 1, 2, 3]
        lost = Gpu(figures={"error": GPU_IS_LOST})
        write_scenario(tmp_path / "gpus", tuple(lost if index == 1 else Gpu() for index in range(GPUS)))
        await until(lambda: _knows(hosts))
        with contextlib.suppress(ProcessLookupError):  # cortex moves it, if it still lives
            os.kill(before[1], signal.SIGKILL)  # as a real engine dies of it
        await until(lambda: _moved(hosts))
        after = {each["devices"][0]: each["pid"] for each in await hosts.until_loaded(MODEL, 4)}
        assert sorted(after) == [0, 2, 3, 4]
        assert {index: pid for index, pid in after.items() if index != 4} == {i: before[i] for i in (0, 2, 3)}


async def _knows(hosts: Hosts) -> bool:
    [node] = (await hosts.get("/fleet"))["nodes"]
    lost: list[Any] = [device["index"] for device in node["devices"] if device.get("lost")]
    return lost == [1]


async def _moved(hosts: Hosts) -> bool:
    return any(each["devices"] == [4] for each in await hosts.loaded(MODEL))
