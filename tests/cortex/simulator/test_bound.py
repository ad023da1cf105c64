"""The wait that no policy can beat: cases computed by hand, and the policies on random traces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cortex.simulator.bound import wait_bound
from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask

FLEET = """
nodes = [{ name = "solo", devices = [{ vram_total_mb = 24576 }] }]
load_secs = { base = 10, per_gb = 0, unload = 0 }
[[models]]
id = "a"
vram_mb = 14000
[[models]]
id = "b"
vram_mb = 14000
[[models]]
id = "c"
vram_mb = 3000
[[models]]
id = "huge"
vram_mb = 90000
"""


@pytest.fixture
def fleet(tmp_path: Path) -> SimulatedFleet:
    (tmp_path / "fleet.toml").write_text(FLEET, encoding="utf-8")
    return load_fleet(tmp_path / "fleet.toml")


def total(fleet: SimulatedFleet, asks: list[Ask], aim_secs: float = 5.0) -> float:
    return wait_bound(fleet, asks, aim_secs=aim_secs).mean * len(asks)


def test_a_first_load_is_waited_for(fleet: SimulatedFleet) -> None:
    """A request during the load waits for the rest of it: 10 + 6 s; a later one not at all."""
    asks = [Ask(0, "a", 1), Ask(4, "a", 1), Ask(500, "a", 1)]
    assert total(fleet, asks) == pytest.approx(16)
    assert wait_bound(fleet, asks, aim_secs=5).p99 == pytest.approx(10)


def test_two_models_that_exclude_each_other_cannot_both_stay(fleet: SimulatedFleet) -> None:
    """One card has room for either, and every turn costs a policy a load of 10 s. The bound keeps half of each: after
    the two first loads, six times 5 s."""
    asks = [Ask(600.0 * turn, "ab"[turn % 2], 1.0) for turn in range(8)]
    assert 45 < total(fleet, asks, aim_secs=10.0) <= 50.5


def test_models_that_fit_together_load_once(fleet: SimulatedFleet) -> None:
    asks = [Ask(600.0 * turn, "ac"[turn % 2], 1.0) for turn in range(8)]
    assert total(fleet, asks) == pytest.approx(20)


def test_requests_that_nothing_can_serve_count_as_no_wait(fleet: SimulatedFleet) -> None:
    assert wait_bound(fleet, [Ask(0, "huge", 1)], aim_secs=1).mean == 0


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_waits_less(fleet: SimulatedFleet, seed: int) -> None:
    """Bursts of three models on a card for two of them."""
    chance = random.Random(seed)
    asks: list[Ask] = []
    for _ in range(25):
        model, at = chance.choice("abc"), chance.uniform(0, 1500)
        for _ in range(chance.randint(1, 6)):
            asks.append(Ask(at, model, chance.uniform(0, 8)))
            at += chance.expovariate(0.1)
    asks.sort()
    for policy in POLICIES:
        reached = simulate(fleet, asks, policy).total.waiting
        bound = wait_bound(fleet, asks, aim_secs=reached.mean)
        assert bound.mean <= reached.mean
        assert bound.p99 <= reached.p99
        assert bound.mean > 0.3 * reached.mean
