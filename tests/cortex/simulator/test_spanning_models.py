"""Models that span hosts in the simulator, under the loader, planner and group keeper of `cortex serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import Simulation
from cortex.simulator.trace import Ask
from tests.cortex.simulator.test_simulator import fleet_of, run

FLEET = """
load_secs = { base = 10, per_gb = 0, unload = 2 }
[[nodes]]
name = "left host"
devices = ["RTX 4090", "RTX 4090"]
[[nodes]]
name = "right host"
devices = ["RTX 4090", "RTX 4090"]
harnesses = ["vllm", "other"]
load_factor = 3
[[models]]
id = "wide"
min_devices = 4
vram_mb = 80000
span_nodes = true
[[models]]
id = "small"
vram_mb = 20000
harness = "other"
"""


@pytest.fixture
def fleet(tmp_path: Path) -> SimulatedFleet:
    return fleet_of(tmp_path, FLEET)


def parts_of(simulation: Simulation, model_id: str) -> dict[str, tuple[int, str, int]]:
    """By node: rank, status and requests of its part."""
    return {
        name: (engine.group.rank, engine.status.value, engine.in_flight)
        for name, neuron in simulation.neurons.items()
        for engine in neuron.engines.values()
        if engine.model_id == model_id and engine.group is not None
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_two_hosts_run_a_model_that_fits_neither(fleet: SimulatedFleet, policy: str) -> None:
    """It has loaded when its slower part has, after 30 s, and only the part of rank 0 gets requests."""
    seen: set[tuple[int, str, int]] = set()

    def look(simulation: Simulation) -> None:
        parts = parts_of(simulation, "wide")
        assert len({status for _, status, _ in parts.values()}) <= 1
        seen.update(parts.values())

    simulation, outcome = run(fleet, [Ask(5, "wide", 20), Ask(100, "wide", 5)], policy, look)
    assert [request.waited for request in simulation.requests] == [pytest.approx(30, abs=1), 0]
    assert seen == {(0, "loading", 0), (1, "loading", 0), (0, "loaded", 0), (0, "loaded", 1), (1, "loaded", 0)}
    assert outcome.total.loads == 1
    assert outcome.total.unserved == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_all_parts_go_for_a_model_that_needs_one_host(fleet: SimulatedFleet, policy: str) -> None:
    """Its memory comes free on both hosts, after its last request, and counts as one eviction."""
    asks = [Ask(0, "wide", 60), Ask(50, "small", 1), Ask(400, "wide", 1)]
    free: list[float] = []

    def look(simulation: Simulation) -> None:
        if "small" in {name for name, _ in simulation.neurons["right host"].engines}:
            free.append(simulation.neurons["left host"].bookable_mb(0))

    simulation, outcome = run(fleet, asks, policy, look)
    first, small, again = simulation.requests
    assert first.ended is not None
    assert small.begun is not None
    assert small.begun > first.ended + 2 + 30
    assert max(free) == 24564 - 512
    assert again.begun is not None
    assert outcome.by_model["wide"].evictions == 1
    assert outcome.by_model["wide"].loads == 2


def test_the_rest_of_a_group_goes_when_a_part_ends(fleet: SimulatedFleet) -> None:
    """As after a crash: the group keeper unloads the other part, and the next request loads the model again."""
    ended: list[float] = []
    unloads: list[asyncio.Future[None]] = []

    def look(simulation: Simulation) -> None:
        if not ended and simulation.requests[0].ended is not None:
            neuron = simulation.neurons["right host"]
            ended.append(simulation.requests[0].ended)
            unloads.append(asyncio.ensure_future(neuron.unload("wide", "0", timeout_secs=9)))
        if ended and ended[0] + 10 < asyncio.get_running_loop().time() < 100:
            assert parts_of(simulation, "wide") == {}

    simulation, outcome = run(fleet, [Ask(0, "wide", 1), Ask(100, "wide", 1)], "planner", look)
    assert ended
    assert outcome.total.loads == 2
    assert simulation.requests[1].waited == pytest.approx(30, abs=1)


def test_cards_that_differ_do_not_run_one_engine(tmp_path: Path) -> None:
    """No policy serves the model, and the request is refused or times out."""
    text = FLEET.replace(
        'devices = ["RTX 4090", "RTX 4090"]\nharnesses', 'devices = ["RTX 5090", "RTX 5090"]\nharnesses'
    )
    fleet = fleet_of(tmp_path, text)
    for policy in POLICIES:
        assert run(fleet, [Ask(0, "wide", 1)], policy)[1].total.unserved == 1
