"""The wait that no policy can beat: cases computed by hand, and the policies on random traces."""

from __future__ import annotations

import random
from collections.abc import Sequence
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


def total(fleet: SimulatedFleet, asks: list[Ask], aim_secs: float = 5.0, *, loads_ahead: bool = True) -> float:
    return wait_bound(fleet, asks, aim_secs=aim_secs, loads_ahead=loads_ahead).mean * len(asks)


def test_a_first_load_is_waited_for(fleet: SimulatedFleet) -> None:
    """A request during the load waits for the rest of it: 10 + 6 s; a later one not at all."""
    asks = [Ask(0, "a", 1), Ask(4, "a", 1), Ask(500, "a", 1)]
    assert total(fleet, asks) == pytest.approx(16)
    assert wait_bound(fleet, asks, aim_secs=5).p99 == pytest.approx(10)


def test_two_models_that_exclude_each_other_cannot_both_stay(fleet: SimulatedFleet) -> None:
    """One card has room for either, and every turn costs a policy a load of 10 s. The bound keeps half of each: after
    the two first loads, six times 5 s. A policy that knows the future waits for the first loads alone."""
    asks = [Ask(600.0 * turn, "ab"[turn % 2], 1.0) for turn in range(8)]
    assert 45 < total(fleet, asks, aim_secs=10.0, loads_ahead=False) <= 50.5
    assert total(fleet, asks, aim_secs=10.0) == pytest.approx(20)


def test_models_that_fit_together_load_once(fleet: SimulatedFleet) -> None:
    asks = [Ask(600.0 * turn, "ac"[turn % 2], 1.0) for turn in range(8)]
    assert total(fleet, asks) == pytest.approx(20)


def test_requests_that_nothing_can_serve_count_as_no_wait(fleet: SimulatedFleet) -> None:
    assert wait_bound(fleet, [Ask(0, "huge", 1)], aim_secs=1).mean == 0


THREE_HOSTS = """
load_secs = { base = 10, per_gb = 1, unload = 2 }
serving = { parallel = 2 }
placement = { replica_target = 1 }
[[nodes]]
name = "old"
devices = ["RTX 3090", "RTX 3090"]
[[nodes]]
name = "new"
devices = ["RTX 4090", "RTX 4090"]
load_factor = 2
[[nodes]]
name = "new-too"
devices = ["RTX 4090", "RTX 4090"]
load_factor = 3
[[models]]
id = "copies"
vram_mb = 20480
replicas = { max = 4 }
[[models]]
id = "kept"
vram_mb = 2048
replicas = { min = 2, max = 3 }
[[models]]
id = "either"
min_compute_capability = "8.9"
[[models.variants]]
name = "fp8"
vram_mb = 20480
[[models.variants]]
name = "split"
min_devices = 2
vram_mb = 20480
min_compute_capability = "8.0"
[[models]]
id = "wide"
min_devices = 4
vram_mb = 81920
span_nodes = true
"""


@pytest.fixture
def three_hosts(tmp_path: Path) -> SimulatedFleet:
    (tmp_path / "three_hosts.toml").write_text(THREE_HOSTS, encoding="utf-8")
    return load_fleet(tmp_path / "three_hosts.toml")


@pytest.mark.parametrize(
    ("model_id", "secs"),
    [
        ("copies", 30),  # 20 GiB, on the fastest host
        ("kept", 0),  # loaded before
        ("either", 30),  # as two halves of 10 GiB on the old cards, which take as long together
        ("wide", 50 * 2),  # 40 GiB on each of two hosts: the second fastest of the three
    ],
)
def test_the_fastest_way_to_run_a_model_counts(three_hosts: SimulatedFleet, model_id: str, secs: float) -> None:
    assert total(three_hosts, [Ask(0, model_id, 1)]) == pytest.approx(secs)


def test_a_model_takes_the_memory_of_its_smallest_variant(tmp_path: Path) -> None:
    """Both models may stay: one policy may load the small variant."""
    variants = '[[models.variants]]\nname = "large"\n[[models.variants]]\nname = "small"\nvram_mb = 7000'
    text = FLEET.replace('id = "a"\nvram_mb = 14000', f'id = "a"\nvram_mb = 14000\n{variants}')
    (tmp_path / "fleet.toml").write_text(text, encoding="utf-8")
    asks = [Ask(600.0 * turn, "ab"[turn % 2], 1.0) for turn in range(8)]
    assert total(load_fleet(tmp_path / "fleet.toml"), asks) == pytest.approx(20)


def bursts(models: Sequence[str], seed: int) -> list[Ask]:
    chance = random.Random(seed)
    asks: list[Ask] = []
    for _ in range(25):
        model, at = chance.choice(models), chance.uniform(0, 1500)
        for _ in range(chance.randint(1, 6)):
            asks.append(Ask(at, model, chance.uniform(0, 8)))
            at += chance.expovariate(0.1)
    return sorted(asks)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_waits_less_with_replicas_variants_and_groups(three_hosts: SimulatedFleet, seed: int) -> None:
    """Bursts of four models that do not all fit, on cards of two kinds."""
    asks = bursts(["copies", "kept", "either", "wide"], seed)
    for policy in POLICIES:
        outcome = simulate(three_hosts, asks, policy)
        bound = wait_bound(three_hosts, asks, aim_secs=outcome.total.waiting.mean)
        assert outcome.total.unserved == 0
        assert 0 < bound.mean <= outcome.total.waiting.mean
        assert bound.p99 <= outcome.total.waiting.p99


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_waits_less(fleet: SimulatedFleet, seed: int) -> None:
    """Bursts of three models on a card for two of them."""
    asks = bursts("abc", seed)
    for policy in POLICIES:
        reached = simulate(fleet, asks, policy).total.waiting
        bound = wait_bound(fleet, asks, aim_secs=reached.mean)
        assert bound.mean <= reached.mean
        assert bound.p99 <= reached.p99
        if policy != "planner":
            bound = wait_bound(fleet, asks, aim_secs=reached.mean, loads_ahead=False)
            assert 0.3 * reached.mean < bound.mean <= reached.mean
