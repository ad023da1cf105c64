"""Engines on the CPU: their memory is booked in the host's RAM, measured there, and freed for others."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil

from tests.neuron.neurons import Neuron, config_of, neuron_here, until

RAM_MB = 64_000
RESERVE_MB = 4_096
BOOKABLE_MB = RAM_MB - RESERVE_MB


@contextlib.asynccontextmanager
async def cpu_host(tmp_path: Path, **changes: Any) -> AsyncIterator[Neuron]:
    simulate = {"ram_mb": RAM_MB, "cores": 16, **changes.pop("simulate", {})}
    async with neuron_here(config_of(tmp_path / "state", simulate=simulate, **changes)) as neuron:
        yield neuron


async def ram(neuron: Neuron) -> dict[str, int]:
    found: dict[str, int] = (await neuron.call("GET", "/health")).body["host"]
    return found


async def on_cpu(neuron: Neuron, model_id: str, vram_mb: int | None, *args: str, **fields: Any) -> Any:
    memory: dict[str, Any] = {} if vram_mb is None else {"vram_mb": vram_mb}
    return await neuron.load(model_id, *args, devices=[], **memory, **fields)


async def test_ram_is_told_booked_and_measured(tmp_path: Path) -> None:
    """In /discovery, /health, /models and /metrics, with the figures of one model."""
    async with cpu_host(tmp_path) as neuron:
        discovery = (await neuron.call("GET", "/discovery")).body
        assert discovery["host"] == {"ram_total_mb": RAM_MB, "cores": 16}
        assert discovery["devices"] == []
        assert (await ram(neuron))["ram_bookable_mb"] == BOOKABLE_MB
        assert (await on_cpu(neuron, "m", 20_000)).status == 200
        entry = await neuron.model("m")
        assert (entry["devices"], entry["ram_booked_mb"], entry["ram_used_mb"]) == ([], 20_000, 20_000)
        assert (entry["vram_booked_mb"], entry["vram_used_mb"]) == (0, None)
        figures = await ram(neuron)
        assert figures["ram_used_mb"] == figures["ram_booked_mb"] == 20_000
        assert (figures["ram_foreign_mb"], figures["ram_bookable_mb"]) == (0, BOOKABLE_MB - 20_000)
        page = (await neuron.call("GET", "/metrics")).body
        told = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(told["neuron_host_memory_booked_bytes"]) == 20_000 * 2**20
        assert float(told['neuron_engine_host_memory_bytes{engine="0",model="m"}']) == 20_000 * 2**20


async def test_a_load_without_room_is_refused(tmp_path: Path) -> None:
    """At once, without an engine, and the error has the figures; permanently if the host is too small for it."""
    async with cpu_host(tmp_path) as neuron:
        assert (await on_cpu(neuron, "first", 40_000)).status == 200
        refused = await on_cpu(neuron, "second", 30_000)
        assert (refused.status, refused.error["code"]) == (409, "insufficient_ram")
        assert "30000 MiB in this host's RAM" in refused.error["message"]
        assert "40000 booked for 'first'" in refused.error["message"]
        assert "permanent" not in refused.error
        assert (await neuron.model("second")) == {}
        huge = await on_cpu(neuron, "huge", RAM_MB)
        assert (huge.error["code"], huge.error["permanent"]) == ("insufficient_ram", True)
        await neuron.unload("first")
        assert (await on_cpu(neuron, "second", 30_000)).status == 200


async def test_a_load_waits_until_the_memory_of_another_is_back(tmp_path: Path) -> None:
    """It is accepted while the other one stops, and its engine starts when that one is gone."""
    async with cpu_host(tmp_path) as neuron:
        await on_cpu(neuron, "old", 40_000)
        old = (await neuron.model("old"))["pid"]
        unload = asyncio.create_task(neuron.unload("old"))
        await neuron.until_status("old", "unloaded")
        assert (await on_cpu(neuron, "new", 40_000)).status == 200
        assert not psutil.pid_exists(old)
        assert (await unload).status == 200


async def test_a_host_without_devices_obeys_a_load_without_a_list_of_them(tmp_path: Path) -> None:
    """As of a cortex that knows nothing of RAM: it is booked too."""
    async with cpu_host(tmp_path) as neuron:
        assert (await neuron.load("m", vram_mb=10_000)).status == 200
        assert (await neuron.model("m"))["ram_booked_mb"] == 10_000
        assert (await on_cpu(neuron, "m", 10_000)).status == 200  # the same engine


async def test_a_model_on_the_cpu_of_a_host_with_gpus(tmp_path: Path) -> None:
    """It takes no device, however small the devices are."""
    simulate = {"devices": ["RTX 3060"]}
    async with cpu_host(tmp_path, simulate=simulate) as neuron:
        assert (await on_cpu(neuron, "in-ram", 40_000)).status == 200
        assert (await neuron.load("on-gpu", vram_mb=12_000)).status == 200
        (device,) = (await neuron.call("GET", "/health")).body["devices"]
        assert (device["vram_booked_mb"], (await neuron.model("on-gpu"))["ram_booked_mb"]) == (12_000, None)
        assert (await ram(neuron))["ram_booked_mb"] == 40_000


async def test_an_engine_that_sleeps_takes_ram(tmp_path: Path) -> None:
    """Its weights are booked there until it wakes; engines on the CPU cannot sleep."""
    async with cpu_host(tmp_path, simulate={"devices": ["RTX 4090"]}) as neuron:
        await neuron.load("m", vram_mb=20_000)
        await on_cpu(neuron, "on-cpu", 1_000)
        assert (await neuron.call("POST", "/models/sleep", json={"model_id": "m"})).status == 200
        entry = await neuron.model("m")
        assert entry["slept_mb"] > 0
        assert (await ram(neuron))["ram_booked_mb"] == entry["slept_mb"] + 1_000
        assert entry["ram_booked_mb"] == entry["slept_mb"]
        assert (await neuron.call("POST", "/models/wake", json={"model_id": "m"})).status == 200
        assert (await ram(neuron))["ram_booked_mb"] == 1_000
        refused = await neuron.call("POST", "/models/sleep", json={"model_id": "on-cpu"})
        assert refused.error["code"] == "sleep_unsupported"


async def test_ram_of_a_real_process_is_measured(tmp_path: Path) -> None:
    """Without simulated memory: what the engine's processes use, as the kernel counts it. The booking stays, since the
    engine may still need it."""
    config = config_of(tmp_path / "state", simulate=None)
    async with neuron_here(config) as neuron:
        assert (await on_cpu(neuron, "m", 900)).status == 200
        entry = await neuron.model("m")
        assert entry["ram_booked_mb"] == 900
        leader = psutil.Process(entry["pid"])
        resident = sum(each.memory_info().rss for each in (leader, *leader.children(recursive=True))) / 2**20
        assert 5 < entry["ram_used_mb"] <= resident + 20
        figures = await ram(neuron)
        assert figures["ram_total_mb"] >= figures["ram_used_mb"] > entry["ram_used_mb"]
        assert figures["ram_booked_mb"] == 900


async def test_the_next_load_books_what_an_engine_used(tmp_path: Path) -> None:
    """A model without `vram_mb`, also after a restart of neuron."""
    for size in (("--vram-mb", "9000"), ()):
        async with cpu_host(tmp_path) as neuron:
            assert (await on_cpu(neuron, "m", None, *size)).status == 200
            assert (await neuron.model("m"))["ram_booked_mb"] == 9_000
            await neuron.unload("m")


async def test_bookings_survive_a_restart_of_neuron(tmp_path: Path) -> None:
    """The next neuron books for the engine that it adopts."""
    async with cpu_host(tmp_path, on_stop="leave_engines") as neuron:
        await on_cpu(neuron, "m", 20_000)
        pid = (await neuron.model("m"))["pid"]
    async with cpu_host(tmp_path) as neuron:
        await neuron.until_status("m", "loaded")
        assert (await neuron.model("m"))["pid"] == pid
        assert (await ram(neuron))["ram_bookable_mb"] == BOOKABLE_MB - 20_000
        assert (await on_cpu(neuron, "m", 20_000)).status == 200


async def test_kill_of_an_engine_frees_its_ram_and_brings_it_back(tmp_path: Path) -> None:
    async with cpu_host(tmp_path) as neuron:
        await on_cpu(neuron, "m", 20_000)
        before = (await neuron.model("m"))["pid"]
        os.kill(before, 9)

        async def is_back() -> bool:
            entry = await neuron.model("m")
            return entry["status"] == "loaded" and entry["pid"] not in (before, None)

        await until(is_back)
        assert (await ram(neuron))["ram_booked_mb"] == 20_000


async def test_engines_share_the_cores(tmp_path: Path) -> None:
    """Each that starts gets an equal part; the first, which is alone, all of them."""
    async with cpu_host(tmp_path) as neuron:
        for model_id in ("a", "b", "c"):
            assert (await on_cpu(neuron, model_id, 1_000)).status == 200
        threads = [
            psutil.Process((await neuron.model(model_id))["pid"]).environ().get("OMP_NUM_THREADS")
            for model_id in ("a", "b", "c")
        ]
        assert threads == [None, "8", "5"]
