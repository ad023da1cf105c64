"""The checks of the chaos test notice what they are meant to notice."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.harness.base import ENGINE_ID_VARIABLE
from tests.e2e.chaos.faults import Fault
from tests.e2e.chaos.fleet import Fleet
from tests.e2e.chaos.invariants import Watch, nothing_left, overbooked
from tests.e2e.chaos.load import Answered, Asked
from tests.e2e.chaos.models import HOSTS, MODELS, feasible_hosts
from tests.e2e.chaos.outcomes import COMPLETE, Kind, Outcome
from tests.e2e.chaos.verdict import SEEN_SECS, judge
from tests.neuron.conftest import mark
from tests.neuron.neurons import until

__all__ = ["mark"]

MODEL = MODELS[1].id
_ENGINE = "import signal; signal.pause()"


@pytest.fixture
async def fleet(mark: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A configured fleet that is not started."""
    async with aiohttp.ClientSession() as http:
        yield Fleet(tmp_path, mark, MODELS, http)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def fake_engine(fleet: Fleet, number: int) -> subprocess.Popen[bytes]:
    """A process that looks like an engine of the first host."""
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _ENGINE, "--served-model-name", MODEL],
        env={**os.environ, ENGINE_ID_VARIABLE: f"{fleet.neurons[0].id_prefix}{number}"},
        start_new_session=True,
    )


async def test_two_engines_of_a_model_on_a_host(fleet: Fleet, processes: list[subprocess.Popen[bytes]]) -> None:
    """One is correct. A second one is noticed, and so are both when they are left over."""
    watch = Watch(fleet)
    processes.append(await asyncio.to_thread(fake_engine, fleet, 1))
    watching = asyncio.create_task(watch.run())
    try:
        await until(lambda: watch.most_engines)
        assert not watch.found
        processes.append(await asyncio.to_thread(fake_engine, fleet, 2))
        await until(lambda: watch.found)
    finally:
        watching.cancel()
    pids = sorted(process.pid for process in processes)
    assert list(watch.found) == [f"{MODEL} has 2 engines on large: {pids}"]
    assert len(await nothing_left(fleet)) == 2


@pytest.mark.parametrize(
    ("booked", "error", "found"),
    [(12_000, None, 0), (12_001, None, 1), (0, "OutOfMemoryError: CUDA out of memory.", 1), (0, "killed", 0)],
)
async def test_overbooking(fleet: Fleet, booked: int, error: str | None, found: int) -> None:
    """The check finds bookings beyond a device's memory, and engines that ran out of it."""
    health: dict[str, Any] = {"devices": [{"index": 0, "vram_booked_mb": booked, "vram_used_mb": 0}]}
    assert len(overbooked(fleet.neuron("small"), health, [{"id": MODEL, "error": error}])) == found


def test_models_do_not_fit_together() -> None:
    """Each fits on some host, but not all of them at once."""
    assert all(feasible_hosts(model.id) for model in MODELS)
    assert feasible_hosts("wide/f") == {"large"}
    assert feasible_hosts("span/s") == {"middle", "twin"}
    assert sum(model.vram_mb * max(1, model.replicas) for model in MODELS) > sum(sum(host.devices_mb) for host in HOSTS)


@pytest.mark.parametrize(
    ("outcome", "down", "violations", "counted"),
    [
        (COMPLETE, [], 0, 1),
        (Outcome(Kind.ERROR, "cold_load_failed"), [], 0, 1),
        (Outcome(Kind.ERROR, "cold_load_failed"), ["large", "middle", "twin", "small"], 0, 0),
        (Outcome(Kind.ERROR, "cold_load_failed"), ["large", "middle", "twin"], 0, 1),
        (Outcome(Kind.VIOLATION), ["large", "middle", "twin", "small"], 1, 0),
        (Outcome(Kind.CUT), [], 1, 1),
        (Outcome(Kind.CUT), ["cortex-0"], 0, 0),
        (Outcome(Kind.REFUSED), ["cortex-1"], 1, 1),
        (Outcome(Kind.LEFT), [], 0, 0),
    ],
)
async def test_verdict(fleet: Fleet, outcome: Outcome, down: list[str], violations: int, counted: int) -> None:
    """The verdict on one request, while the services `down` were unavailable."""
    for service in fleet.services:
        if service.name in down:
            service.is_down()
    now = time.monotonic()
    answer = Answered(Asked(MODEL, "chat", streamed=True, tokens=1), "cortex-0", now, now, None, "", "", outcome)
    for service in fleet.services:
        service.is_back()
    verdict = judge(fleet, [answer], [])
    assert (len(verdict.violations), len(verdict.counted)) == (violations, counted)
    assert verdict.succeeded == (outcome == COMPLETE)


@pytest.mark.parametrize(
    ("code", "hit", "barred", "lost"),
    [
        ("cold_load_failed", {"twin": MODEL, "small": MODEL}, 1, 0),
        ("stream:cold_load_failed", {"twin": MODEL, "small": MODEL}, 1, 0),
        ("cold_load_failed", {"twin": MODEL}, 0, 0),
        ("cold_load_failed", {"twin": MODEL, "small": "hot/a"}, 0, 0),
        ("cold_load_failed", {"twin": MODEL, "small": ""}, 0, 0),
        ("neuron_unavailable", {"twin": MODEL, "small": MODEL}, 0, 0),
        ("stream:upstream_lost", {"small": MODEL}, 0, 1),
        ("stream:upstream_lost", {"twin": MODEL}, 0, 0),
        ("upstream_unreachable", {"small": MODEL}, 0, 0),
    ],
)
async def test_what_faults_left_no_host_for(
    fleet: Fleet, code: str, hit: dict[str, str], barred: int, lost: int
) -> None:
    """Two hosts are down, engines of models are hit on others, and a request to `small` fails. It is a failure unless
    its own engine was lost, or no host was left for its model."""
    for neuron in fleet.neurons[:2]:
        neuron.is_down()
    now = time.monotonic()
    asked = Asked(MODEL, "chat", streamed=True, tokens=1)
    answer = Answered(asked, "cortex-0", now, now, now, "small", "", Outcome(Kind.ERROR, code))
    verdict = judge(fleet, [answer], [Fault(now, now, "", frozenset((host,)), model) for host, model in hit.items()])
    assert (verdict.barred, verdict.lost) == (barred, lost)
    assert len(verdict.failures) == 1 - barred - lost


@pytest.mark.parametrize(("down", "counted"), [(["large", "small"], 1), (["twin"], 0)])
async def test_a_model_over_two_hosts_needs_both(fleet: Fleet, down: list[str], counted: int) -> None:
    for service in fleet.services:
        if service.name in down:
            service.is_down()
    now = time.monotonic()
    asked = Asked("span/s", "chat", streamed=True, tokens=1)
    answer = Answered(asked, "cortex-0", now, now, None, "", "", Outcome(Kind.ERROR, "cold_load_failed"))
    assert len(judge(fleet, [answer], []).counted) == counted


async def test_a_restarted_neuron_counts_after_a_poll(fleet: Fleet) -> None:
    """A restarted neuron counts only after every cortex has had time to poll it."""
    [*_, small] = fleet.neurons
    small.is_down()
    small.is_back()
    [down] = small.downs
    assert small.was_down(down.until + 1, down.until + 2, recovery_secs=SEEN_SECS)
    assert not small.was_down(down.until + SEEN_SECS + 0.1, down.until + 9, recovery_secs=SEEN_SECS)
    small.is_down()
    small.is_back(start_secs=5)
    assert small.was_down(small.downs[-1].until + SEEN_SECS + 4, small.downs[-1].until + 9, recovery_secs=SEEN_SECS)
    assert not small.was_down(small.downs[-1].until + 4, small.downs[-1].until + 9)
