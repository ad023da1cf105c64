"""A real neuron, real processes, and whatever can happen to them, in random order.

FAULT_SEED=N replays a run, FAULT_STEPS=N makes it longer or shorter, FAULT_KINDS=load,kill_core lets only those happen.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.harness.base import ENGINE_ID_VARIABLE
from tests.neuron.faults.faults import Faults
from tests.neuron.faults.host import DEVICE_MB, Host, engine_processes, send
from tests.neuron.faults.oracle import agreement, look
from tests.neuron.neurons import until

SEED = int(os.environ.get("FAULT_SEED", "20261125"))
STEPS = int(os.environ.get("FAULT_STEPS", "200"))
KINDS = os.environ.get("FAULT_KINDS", "")

Fault = Callable[[Faults, float], Awaitable[str]]
WEIGHTS: dict[Fault, int] = {
    Faults.load: 45,
    Faults.load_in_passing: 15,
    Faults.unload: 10,
    Faults.unload_in_passing: 5,
    Faults.kill_engine: 9,
    Faults.kill_core: 8,
    Faults.stop_engine: 3,
    Faults.stop_core: 3,
    Faults.sicken_engine: 4,
    Faults.hang_engine: 4,
    Faults.steal_port: 5,
    Faults.kill_engine_behind_neurons_back: 3,
    Faults.kill_neuron: 5,
    Faults.kill_neuron_as_it_loads: 4,
    Faults.kill_neuron_as_it_begins: 2,
    Faults.kill_neuron_and_engine: 3,
    Faults.restart_neuron: 2,
    Faults.fill_device: 6,
    Faults.fill_disk: 5,
}
"""The faults, with their relative frequency."""
_RELIEF = 0.15  # a full disk or full devices block most other faults: the chance per step that it ends


@pytest.fixture
async def host(mark: str, tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path, mark)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def chosen(chance: random.Random, host: Host) -> Fault:
    """The next fault."""
    kinds = [fault for fault in WEIGHTS if not KINDS or fault.__name__ in KINDS.split(",")]
    fault = chance.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
    relieved = chance.random() < _RELIEF
    if relieved and host.disk_full:
        return Faults.fill_disk
    if relieved and any(host.foreign_mb.values()):
        return Faults.empty_devices
    return fault


@pytest.mark.timeout(60 + 3 * STEPS)
async def test_no_fault_makes_neuron_lose_a_process_or_a_byte(host: Host, mark: str, tmp_path: Path) -> None:
    """After every step the ledger, the process table and `GET /models` agree within 5 s; at the end nothing is left."""
    chance, faults = random.Random(SEED), Faults(host)
    history: list[str] = []

    async def check(step: Awaitable[str]) -> None:
        began = time.monotonic()
        try:
            did = await step
            done = time.monotonic()
            found = await agreement(host)
        except (aiohttp.ClientError, asyncio.TimeoutError, AssertionError) as error:
            pytest.fail(report([f"{type(error).__name__}: {error}"]))
        history.append(f"{len(history) + 1:3} {done - began:5.2f} s + {time.monotonic() - done:5.2f} s {did}")
        (tmp_path / "steps.txt").write_text("\n".join(history))
        assert not found, report(found)

    def report(found: list[str]) -> str:
        """Everything needed to understand and repeat the failure."""
        head = f"FAULT_SEED={SEED}, after step {len(history)}:"
        return "\n".join((head, *found, "", "steps:", *history, "", host.log_tail()))

    try:
        for _ in range(STEPS):
            await check(chosen(chance, host)(faults, chance.random()))
        await check(faults.heal(0))
        await check(faults.calls_answered(0))
        for model in await host.models():
            await check(faults.unload_model(model["id"]))
        assert not engine_processes(mark)
        assert await host.stop() == 0, host.log_tail()
    finally:
        await host.kill()
        await faults.close()


async def test_the_oracle_sees_an_orphan(host: Host) -> None:
    """A process with an engine's mark that belongs to no model is reported."""
    await Faults(host).load(0)
    assert await look(host) == []
    env = {**os.environ, ENGINE_ID_VARIABLE: "gone/1"}
    code = "import signal; signal.pause()"
    orphan = await asyncio.to_thread(
        lambda: subprocess.Popen([sys.executable, "-S", "-E", "-c", code], env=env, start_new_session=True)
    )
    try:
        found = await look(host)
    finally:
        orphan.kill()
        await asyncio.to_thread(orphan.wait)
    assert found == [f"process {orphan.pid} of session {orphan.pid} belongs to no model"]


async def test_a_model_that_finds_no_room_again_holds_none(host: Host) -> None:
    """Its engine dies and a foreign process takes the memory: while it waits for the next attempt it is shown without a
    device."""
    await Faults(host).load(0.99)
    [model] = await host.models()
    host.neuron.send_signal(signal.SIGSTOP)
    for process in engine_processes(host.mark):
        send(process.pid, signal.SIGKILL)
    for index in host.foreign_mb:
        host.hold_foreign(index, DEVICE_MB)
    host.neuron.send_signal(signal.SIGCONT)

    async def tried_again() -> dict[str, Any] | None:
        [now] = await host.models()
        return now if now["failures"] >= 2 else None

    found = await until(tried_again)
    assert found["state"] in ("recovering", "failed")
    assert (found["devices"], found["vram_booked_mb"], found["pid"]) == ([], 0, None)
    assert found["id"] == model["id"] == "wide"
