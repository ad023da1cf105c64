"""Never two engines where there is room for one: a start waits for the end of the engine that it replaces, also where
memory is not measured. Judged by the engines' processes, not by what neuron says of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from neuron.gpu.simulated_vram import VRAM_DIR_VARIABLE
from neuron.harness.base import ENGINE_ID_VARIABLE
from tests.neuron.neurons import Neuron, config_of, marked_processes, neuron_here, until
from tests.processes import EXITED

OLD, NEW = "org/old", "org/new"
VRAM_MB = 20_000
HOSTS: dict[str, dict[str, Any]] = {
    "measured": {"simulate": {"devices": ["RTX 4090"]}},
    # The engines record their memory where the simulated driver does not look.
    "not measured": {"simulate": {"devices": ["RTX 4090"]}, "sim": {"env": {VRAM_DIR_VARIABLE: "{elsewhere}"}}},
    "no devices": {"simulate": {"devices": []}},
}


@contextlib.asynccontextmanager
async def one_card(directory: Path, host: str) -> AsyncIterator[Neuron]:
    changes = dict(HOSTS[host])
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    sim = {"stop_timeout_secs": 1, **changes.pop("sim", {})}
    if "env" in sim:
        sim["env"] = {name: value.format(elsewhere=elsewhere) for name, value in sim["env"].items()}
    async with neuron_here(config_of(directory / "state", **changes, sim=sim)) as neuron:
        yield neuron


class Witness:
    """Watches which engines have live processes, as fast as it can."""

    def __init__(self, mark: str) -> None:
        self.together: set[frozenset[str]] = set()
        """The sets of engines that were seen alive at once, by engine id."""
        self._mark = mark

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        self.look()
        ended = asyncio.Event()
        task = asyncio.create_task(asyncio.to_thread(self._watch, ended))
        try:
            yield
        finally:
            ended.set()
            await task

    def look(self) -> None:
        """Records the engines that are alive now. On a busy machine the watching alone can miss one."""
        self.together.add(self._alive())

    def _alive(self) -> frozenset[str]:
        found = set()
        for pid in marked_processes(self._mark):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                engine = process.environ().get(ENGINE_ID_VARIABLE)
                if engine is not None and process.status() not in EXITED:
                    found.add(engine)
        return frozenset(found)

    def _watch(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            self.look()


async def kill_leader(neuron: Neuron) -> None:
    os.kill((await neuron.model(OLD))["pid"], signal.SIGKILL)


async def nothing(neuron: Neuron) -> None:
    """The engine is left to stop as neuron asks it to."""


LEAVING: dict[str, tuple[list[str], Callable[[Neuron], Any]]] = {
    "on request": ([], nothing),
    "ignores SIGTERM": (["--fault", "ignore-sigterm"], nothing),
    "killed": (["--fault", "ignore-sigterm"], kill_leader),
    "its child outlives it": (["--fault", "spawn-child"], nothing),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("args", "act"), LEAVING.values(), ids=LEAVING)
async def test_a_start_waits_for_the_end_of_another_engine(
    mark: str, tmp_path: Path, host: str, args: list[str], act: Callable[[Neuron], Any]
) -> None:
    """The load arrives while the other engine is being unloaded."""
    witness = Witness(mark)
    async with one_card(tmp_path, host) as neuron:
        assert (await neuron.load(OLD, *args, vram_mb=VRAM_MB)).status == 200
        async with witness.watching():
            unloading = asyncio.create_task(neuron.unload(OLD))
            await neuron.until_status(OLD, "unloaded")
            loading = asyncio.create_task(neuron.load(NEW, vram_mb=VRAM_MB))
            await neuron.until_status(NEW, "loading")
            await act(neuron)
            assert (await loading).status == 200
            witness.look()
            assert (await unloading).status == 200
    assert {len(engines) for engines in witness.together} <= {0, 1}
    assert len(frozenset().union(*witness.together)) == 2


@pytest.mark.parametrize("host", ["measured", "not measured"])
async def test_two_starts_wait_for_one_engine(mark: str, tmp_path: Path, host: str) -> None:
    """Of two loads at once only one gets the memory that becomes free."""
    witness = Witness(mark)
    async with one_card(tmp_path, host) as neuron:
        assert (await neuron.load(OLD, "--fault", "ignore-sigterm", vram_mb=VRAM_MB)).status == 200
        async with witness.watching():
            unloading = asyncio.create_task(neuron.unload(OLD))
            await neuron.until_status(OLD, "unloaded")
            answers = await asyncio.gather(*(neuron.load(f"org/new{n}", vram_mb=VRAM_MB) for n in range(2)))
            await unloading
        assert sorted(answer.status for answer in answers) == [200, 409]
    assert {len(engines) for engines in witness.together} <= {0, 1}


async def test_a_waiting_start_says_what_it_waits_for(mark: str, tmp_path: Path) -> None:
    """And it can be cancelled."""
    async with one_card(tmp_path, "not measured") as neuron:
        await neuron.load(OLD, "--fault", "ignore-sigterm", vram_mb=VRAM_MB)
        unloading = asyncio.create_task(neuron.unload(OLD))
        await neuron.until_status(OLD, "unloaded")
        loading = asyncio.create_task(neuron.load(NEW, vram_mb=VRAM_MB))

        async def message() -> str:
            return ((await neuron.model(NEW)).get("progress") or {}).get("message") or ""

        assert await until(message) == f"waiting until {OLD} is gone from the same device"
        assert (await neuron.unload(NEW)).status == 200
        assert (await loading).error["code"] == "load_cancelled"
        await unloading
