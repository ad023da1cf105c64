"""Four neurons, two cortexes, more models than fit, clients of every dialect, and faults at random.

One model has three replicas, one has variants, and one spans two hosts.

CHAOS_SEED=N replays the faults and the requests, CHAOS_SECS=N makes it longer or shorter, CHAOS_KINDS=kill_core,…
allows only those faults, CHAOS_MODELS=N serves the first N models, CHAOS_CLIENTS=N changes the load.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.chaos import report
from tests.e2e.chaos.faults import Faults, schedule_of
from tests.e2e.chaos.fleet import Fleet
from tests.e2e.chaos.invariants import Watch, nothing_left, settled
from tests.e2e.chaos.load import Asked, Clients
from tests.e2e.chaos.models import MODELS
from tests.e2e.chaos.outcomes import Kind
from tests.e2e.chaos.verdict import judge
from tests.neuron.conftest import mark

__all__ = ["mark"]

SEED = int(os.environ.get("CHAOS_SEED", "5"))
SECS = float(os.environ.get("CHAOS_SECS", "45"))
CLIENTS = int(os.environ.get("CHAOS_CLIENTS", "40"))
SHOWN_MODELS = MODELS[: int(os.environ.get("CHAOS_MODELS", str(len(MODELS))))]
FAULT_KINDS = [kind for kind in os.environ.get("CHAOS_KINDS", "").split(",") if kind]
LEAST_SHARE = 0.99
_PAUSE_SECS = 0.4  # a client's average pause between two requests


@pytest.fixture
async def fleet(mark: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with aiohttp.ClientSession() as http:
        made = Fleet(tmp_path, mark, SHOWN_MODELS, http)
        try:
            await made.start()
            yield made
        finally:
            await made.kill_all()


@pytest.mark.timeout(360 + 2 * SECS)
async def test_every_request_completes_or_gets_an_error(fleet: Fleet, tmp_path: Path) -> None:
    """Each request completes or gets one typed error. A model never has more engines on a host than it may, no
    device is overbooked, and nothing is left at the end. Of the requests that faults left a host for 99 % succeed."""
    faults, watch = Faults(fleet), Watch(fleet)
    clients = Clients(fleet.cortexes, fleet.models, seed=SEED, pause_secs=_PAUSE_SECS)
    start = time.monotonic()
    watching = asyncio.create_task(watch.run())
    problems: list[str] = []
    try:
        await asyncio.gather(
            clients.ask_for(SECS, clients=CLIENTS), faults.execute(schedule_of(SEED, SECS, FAULT_KINDS))
        )
        problems += await settled(fleet)
        problems += await _each_model_answers(fleet)
    finally:
        watching.cancel()
        verdict = judge(fleet, clients.answered, faults.log)
        summary = report.summary(verdict, clients.answered, watch)
        report.write(tmp_path, clients.answered, faults.log, start)
        print(f"CHAOS_SEED={SEED} CHAOS_SECS={SECS:g}, logs and reports in {tmp_path}\n{summary}")
        print(report.details(fleet, verdict, faults.log, start))  # pytest shows it when the test fails
    problems += [f"{at - start:.3f}: {what}" for what, at in watch.found.items()]
    problems += await _ended(fleet)
    problems += [answer.line(start) for answer in verdict.violations]
    assert not problems, "\n".join(problems)
    assert verdict.share >= LEAST_SHARE, summary


async def _each_model_answers(fleet: Fleet) -> list[str]:
    """Checks at the end that every model answers through each cortex."""
    clients = Clients(fleet.cortexes, fleet.models, seed=SEED, pause_secs=0)
    async with aiohttp.ClientSession(auto_decompress=False) as http:
        for model in fleet.models:
            for cortex in fleet.cortexes:
                await clients.ask(http, cortex, Asked(model.id, "chat", streamed=True, tokens=4))
    return [
        f"at the end: {answer.asked.model_id} through {answer.cortex}: {answer.outcome}"
        for answer in clients.answered
        if answer.outcome.kind is not Kind.COMPLETE
    ]


async def _ended(fleet: Fleet) -> list[str]:
    """Stops the fleet normally. Returns what went wrong, and what is left of it."""
    found = []
    for cortex in fleet.cortexes:
        if (status := await cortex.end(signal.SIGTERM)) != 0:
            found.append(f"{cortex.name} exited with {status}")
    for neuron in fleet.neurons:
        for model in await neuron.get("/models"):
            body = {"model_id": model["id"]}
            async with fleet.http.post(f"{neuron.url}/models/unload", json=body) as response:
                if response.status != 200:
                    found.append(f"{neuron.name}: unload of {model['id']}: {response.status} {await response.text()}")
        if (status := await neuron.end(signal.SIGTERM)) != 0:
            found.append(f"{neuron.name} exited with {status}")
    return found + [f"left: {what}" for what in await nothing_left(fleet)]
