"""A real neuron, real processes, and whatever can happen to them, in random order.

FAULT_SEED=N replays a run, FAULT_STEPS=N makes it longer or shorter, FAULT_KINDS=load,kill_core lets only those happen.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from neuron.harness.base import ENGINE_ID_VARIABLE
from tests.neuron.faults.host import FaultyHost, engine_processes
from tests.neuron.faults.oracle import agreement, look

SEED = int(os.environ.get("FAULT_SEED", "20261125"))
STEPS = int(os.environ.get("FAULT_STEPS", "200"))
KINDS = os.environ.get("FAULT_KINDS", "")

Fault = Callable[[FaultyHost, float], Awaitable[str]]
FAULTS: dict[Fault, int] = {
    FaultyHost.load: 30,
    FaultyHost.load_in_passing: 15,
    FaultyHost.unload: 12,
    FaultyHost.unload_in_passing: 6,
    FaultyHost.kill_engine: 10,
    FaultyHost.kill_core: 8,
    FaultyHost.sicken_engine: 4,
    FaultyHost.stop_engine: 4,
    FaultyHost.stop_core: 3,
    FaultyHost.kill_neuron: 7,
    FaultyHost.kill_engine_behind_neurons_back: 3,
    FaultyHost.steal_port: 5,
    FaultyHost.fill_device: 6,
    FaultyHost.fill_disk: 5,
}
"""What can happen, and how often beside the others."""
_ROOM_AGAIN = 0.2  # with a full disk little else can happen, so that it does not last


@pytest.fixture
async def host(mark: str, tmp_path: Path) -> AsyncIterator[FaultyHost]:
    made = FaultyHost(tmp_path, mark)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


@pytest.mark.timeout(60 + 3 * STEPS)
async def test_no_fault_makes_neuron_lose_a_process_or_a_byte(host: FaultyHost, mark: str, tmp_path: Path) -> None:
    """After every step the ledger, the process table and `GET /models` agree within 5 s; at the end nothing is left."""
    chance = random.Random(SEED)
    history: list[str] = []

    async def check(step: Awaitable[str]) -> None:
        began = time.monotonic()
        did = await step
        done = time.monotonic()
        found = await agreement(host)
        history.append(f"{len(history) + 1:3} {done - began:5.2f} s + {time.monotonic() - done:5.2f} s {did}")
        (tmp_path / "steps.txt").write_text("\n".join(history))
        assert not found, "\n".join(
            (f"FAULT_SEED={SEED}, step {len(history)}:", *found, "", "steps:", *history, "", host.log_tail())
        )

    faults = {fault: weight for fault, weight in FAULTS.items() if not KINDS or fault.__name__ in KINDS.split(",")}
    for _ in range(STEPS):
        fault = chance.choices(list(faults), list(faults.values()))[0]
        if host.disk_full and chance.random() < _ROOM_AGAIN:
            fault = FaultyHost.fill_disk
        await check(fault(host, chance.random()))
    await check(host.heal(0))
    await check(host.calls_answered())
    for model in await host.models():
        await check(host.unload_model(model["id"]))
    assert not engine_processes(mark)
    assert await host.stop() == 0, host.log_tail()


async def test_the_oracle_sees_an_orphan(host: FaultyHost) -> None:
    """A process with an engine's mark that no model has; and a model whose process has gone unnoticed."""
    await host.load(0)
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
