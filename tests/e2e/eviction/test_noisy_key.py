"""One key with many requests for models that force swaps, beside nine with a request every moment, through real
processes. Judged by cortex's own log of its loads: on a slow machine they come later, never sooner.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from datetime import datetime
from pathlib import Path

import pytest
import tomli_w

from tests.e2e.eviction.test_eviction import SmallFleet, fleet_of, model
from tests.neuron.conftest import mark
from tests.neuron.neurons import until

__all__ = ["mark"]

pytestmark = pytest.mark.usefixtures("mark")

QUIET, NOISY = "a", "bc"
QUIET_KEYS = [f"quiet{number}" for number in range(9)]
KEYS = [{"name": name, "key": f"secret-{name}"} for name in ("noisy", *QUIET_KEYS)]
NOISY_REQUESTS = 500
PATIENCE_SECS = 4.0
TURNS = 2
LOG_SECS = 0.5
"""How long after a load its requests may be admitted."""
_LOAD = re.compile(r"^(\S+ \S+) INFO +cortex\.control\.loads\.loader: (loading|loaded) (\w) on ", re.MULTILINE)


class Traffic:
    """Requests with keys, and when those of the quiet ones began and ended."""

    def __init__(self, fleet: SmallFleet) -> None:
        self.fleet = fleet
        self.quiet: list[tuple[float, float]] = []
        self.noisy_answers = 0

    async def ask(self, key: str, name: str) -> None:
        body = {"model": name, "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        headers = {"Authorization": f"Bearer secret-{key}"}
        async with self.fleet.http.post(f"{self.fleet.url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            await response.read()

    async def ask_quietly(self, key: str) -> None:
        while True:
            began = time.time()
            await self.ask(key, QUIET)
            self.quiet.append((began, time.time()))
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def ask_noisily(self, name: str) -> None:
        await self.ask("noisy", name)
        self.noisy_answers += 1

    def noisy_loads(self, kind: str) -> list[float]:
        """When models of the noisy key began to load, or were loaded."""
        found = _LOAD.findall(self.fleet.log.read_text(encoding="utf-8"))
        return [_parsed(at) for at, each, name in found if each == kind and name in NOISY]


def _parsed(at: str) -> float:
    return datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_noisy_key_gets_turns_and_no_quiet_request_waits_for_two_of_them(tmp_path: Path, workers: int) -> None:
    """The noisy key has to wait for all of `patience_secs` before each turn, although the quiet keys' model
    has no requests for a moment right after it has been loaded again; and it gets its turn then."""
    (tmp_path / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    async with fleet_of(
        tmp_path,
        [model(name) for name in (QUIET, *NOISY)],
        workers=workers,
        keys={"file": str(tmp_path / "keys.toml")},
        placement={"patience_secs": PATIENCE_SECS},
    ) as fleet:
        traffic = Traffic(fleet)
        await traffic.ask(QUIET_KEYS[0], QUIET)
        quiet = [asyncio.create_task(traffic.ask_quietly(key)) for key in QUIET_KEYS]
        await until(lambda: len(traffic.quiet) >= 2 * len(QUIET_KEYS))
        began = time.time()
        noisy = [asyncio.create_task(traffic.ask_noisily(NOISY[number % 2])) for number in range(NOISY_REQUESTS)]
        await until(lambda: len(traffic.noisy_loads("loaded")) >= TURNS, 120)
        answered = len(traffic.quiet)
        await until(lambda: len(traffic.quiet) >= answered + len(QUIET_KEYS))
        for task in (*quiet, *noisy):
            task.cancel()
        ended = await asyncio.gather(*quiet, *noisy, return_exceptions=True)
    assert [each for each in ended if isinstance(each, Exception)] == []
    assert traffic.noisy_answers > 0
    loading, loaded = traffic.noisy_loads("loading"), traffic.noisy_loads("loaded")
    pauses = [begin - end for end, begin in zip([began, *loaded], loading, strict=False)]
    assert min(pauses) >= PATIENCE_SECS - LOG_SECS, pauses
    for since, to in traffic.quiet:
        assert sum(since < at < to for at in loading) <= 1
