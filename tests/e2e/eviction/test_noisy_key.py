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
SEVERAL_QUIET = "ade"
QUIET_KEYS = [f"quiet{number}" for number in range(9)]
KEYS = [{"name": name, "key": f"secret-{name}"} for name in ("noisy", *QUIET_KEYS)]
NOISY_REQUESTS = 500
PATIENCE_SECS = 4.0
SEVERAL_PATIENCE_SECS = 15.0
"""More than a load takes on a busy machine: after that time a displaced model may displace others after all."""
TURNS = 2
LOG_SECS = 0.5
"""How long after a load its requests may be admitted."""
_LOAD = re.compile(r"^(\S+ \S+) INFO +cortex\.control\.loads\.loader: (loading|loaded) (\w) on ", re.MULTILINE)


class Traffic:
    """Requests with keys, and when those of the quiet ones began and ended."""

    def __init__(self, fleet: SmallFleet, models: str = QUIET) -> None:
        """`models` are those of the quiet keys."""
        self.fleet = fleet
        self.models = models
        self.quiet: list[tuple[float, float]] = []
        self.noisy_answers = 0

    async def ask(self, key: str, name: str) -> None:
        body = {"model": name, "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        headers = {"Authorization": f"Bearer secret-{key}"}
        async with self.fleet.http.post(f"{self.fleet.url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            await response.read()

    async def ask_quietly(self, key: str) -> None:
        name = self.models[QUIET_KEYS.index(key) % len(self.models)]
        while True:
            began = time.time()
            await self.ask(key, name)
            self.quiet.append((began, time.time()))
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def ask_noisily(self, name: str) -> None:
        await self.ask("noisy", name)
        self.noisy_answers += 1

    def loads(self, kind: str, models: str) -> list[float]:
        """When these models began to load, or were loaded."""
        found = _LOAD.findall(self.fleet.log.read_text(encoding="utf-8"))
        return [_parsed(at) for at, each, name in found if each == kind and name in models]


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
        await _check(Traffic(fleet), PATIENCE_SECS)


@pytest.mark.timeout(240)
async def test_quiet_keys_with_several_models_do_not_displace_each_other(tmp_path: Path) -> None:
    """Three models of the quiet keys fit, and one of them has to go for each turn of the noisy key. It takes the
    memory back from that key, so no other one has to be loaded again."""
    (tmp_path / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    async with fleet_of(
        tmp_path,
        [model(name, 7000) for name in (*SEVERAL_QUIET, *NOISY)],
        keys={"file": str(tmp_path / "keys.toml")},
        placement={"patience_secs": SEVERAL_PATIENCE_SECS},
    ) as fleet:
        traffic = Traffic(fleet, SEVERAL_QUIET)
        await _check(traffic, SEVERAL_PATIENCE_SECS)
    turns = len(traffic.loads("loading", NOISY))
    assert len(traffic.loads("loading", SEVERAL_QUIET)) <= len(SEVERAL_QUIET) + turns


async def _check(traffic: Traffic, patience_secs: float) -> None:
    """Plays the requests until the noisy key has had its turns, and checks that it waits for each, and that no quiet
    request waits for two of them."""
    await asyncio.gather(*(traffic.ask(QUIET_KEYS[0], name) for name in traffic.models))
    quiet = [asyncio.create_task(traffic.ask_quietly(key)) for key in QUIET_KEYS]
    await until(lambda: len(traffic.quiet) >= 2 * len(QUIET_KEYS))
    began = time.time()
    noisy = [asyncio.create_task(traffic.ask_noisily(NOISY[number % 2])) for number in range(NOISY_REQUESTS)]
    await until(lambda: len(traffic.loads("loaded", NOISY)) >= TURNS, 120)
    answered = len(traffic.quiet)
    await until(lambda: len(traffic.quiet) >= answered + len(QUIET_KEYS))
    for task in (*quiet, *noisy):
        task.cancel()
    ended = await asyncio.gather(*quiet, *noisy, return_exceptions=True)
    assert [each for each in ended if isinstance(each, Exception)] == []
    assert traffic.noisy_answers > 0
    loading, loaded = traffic.loads("loading", NOISY), traffic.loads("loaded", NOISY)
    pauses = [begin - end for end, begin in zip([began, *loaded], loading, strict=False)]
    assert min(pauses) >= patience_secs - LOG_SECS, pauses
    for since, to in traffic.quiet:
        assert sum(since < at < to for at in loading) <= 1
