"""Several instances of a model and its variants in the simulator, and what an unload waits for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cortex.fleet.neuron_client import NeuronRefused
from cortex.fleet.state import Fleet
from cortex.simulator.engine import SimulatedRequest
from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.neuron import GroupStarts, SimulatedNeuron
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import Simulation
from cortex.simulator.trace import Ask
from cortex.simulator.virtual_time import VirtualTimeLoop, run_in_virtual_time
from shared.protocol import ErrorCode, LoadCommand
from tests.cortex.simulator.test_simulator import fleet_of, problems_of, run

FLEET = """
nodes = [{{ name = "solo", devices = [{devices}] }}]
load_secs = {{ base = 10, per_gb = 0, unload = 2 }}
serving = {{ parallel = 1 }}
[[models]]
id = "a"
{model}
"""


def _fleet(tmp_path: Path, devices: str, model: str) -> SimulatedFleet:
    return fleet_of(tmp_path, FLEET.format(devices=devices, model=model))


def test_a_minimum_of_instances_is_loaded_and_used(tmp_path: Path) -> None:
    """Four instances on four cards of one host: each has its own card and serves its part."""
    fleet = _fleet(tmp_path, ", ".join(['"RTX 4090"'] * 4), "vram_mb = 20000\nreplicas = { min = 4, max = 4 }")
    used: dict[str, set[int]] = {}
    seen: Counter[str] = Counter()

    def look(simulation: Simulation) -> None:
        for (_, instance), engine in simulation.neurons["solo"].engines.items():
            used[instance] = set(engine.devices)
            seen[instance] = max(seen[instance], engine.in_flight)

    _, outcome = run(fleet, [Ask(30 + index / 10, "a", 20) for index in range(8)], "planner", look)
    assert sorted(used) == ["0", "1", "2", "3"]
    assert set.union(*used.values()) == {0, 1, 2, 3}
    assert set(seen.values()) == {2}
    assert outcome.total.loads == 4
    assert outcome.total.waiting.max == 0


def test_each_host_gets_its_variant(tmp_path: Path) -> None:
    """The first variant does not fit on the small card of the other host."""
    variants = """
vram_mb = 20000
replicas = { min = 2, max = 2 }
[[models.variants]]
name = "big"
[[models.variants]]
name = "small"
vram_mb = 8000
"""
    text = FLEET.format(devices='"RTX 4090"', model=variants)
    fleet = fleet_of(tmp_path, text.replace("nodes = [", 'nodes = [{ name = "tiny", devices = ["RTX 3060"] }, '))
    simulation, _ = run(fleet, [Ask(60, "a", 1)], "planner")
    found = {
        name: [(each.variant, each.booked_mb) for each in neuron.engines.values()]
        for name, neuron in simulation.neurons.items()
    }
    assert found == {"solo": [("big", 20000)], "tiny": [("small", 8000)]}


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_load_the_variant_that_the_card_can_hold(tmp_path: Path, policy: str) -> None:
    """The first variant needs a newer card, the second a larger one. The model's own size counts for neither."""
    variants = """
[[models.variants]]
name = "fp8"
vram_mb = 8000
min_compute_capability = "8.9"
[[models.variants]]
name = "large"
vram_mb = 20000
[[models.variants]]
name = "awq"
vram_mb = 7000
"""
    simulation, outcome = run(
        _fleet(tmp_path, '{ name = "RTX 3060", vram_total_mb = 12288, compute_capability = "8.6" }', variants),
        [Ask(0, "a", 1)],
        policy,
    )
    found = [(each.variant, each.booked_mb) for each in simulation.neurons["solo"].engines.values()]
    assert (found, outcome.total.unserved) == ([("awq", 7000)], 0)


def test_adapters_share_the_engine_of_their_base(tmp_path: Path) -> None:
    """One load serves the base and both adapters, which displace each other and never while one has requests."""
    adapters = """max_loras = 1
vram_mb = 20000
[[models]]
id = "x"
base = "a"
lora = "/x"
[[models]]
id = "y"
base = "a"
lora = "/y"
"""
    trace = [Ask(0, "x", 20), Ask(15, "y", 5), Ask(16, "a", 1)]
    simulation, outcome = run(_fleet(tmp_path, '"RTX 4090"', adapters), trace, "planner")
    assert (outcome.total.loads, outcome.total.unserved) == (1, 0)
    assert [engine.adapters for engine in simulation.neurons["solo"].engines.values()] == [["y"]]
    x, y = (next(each for each in simulation.requests if each.model == name) for name in ("x", "y"))
    assert x.ended is not None
    assert y.begun is not None
    assert y.begun >= x.ended


def test_each_variant_needs_its_size(tmp_path: Path) -> None:
    text = FLEET.format(devices='"RTX 4090"', model='[[models.variants]]\nname = "x"\nvram_mb = 9\n[[models.variants]]')
    assert "vram_mb: required here" in problems_of(tmp_path, text)


@pytest.mark.parametrize(("drain_secs", "gone_at"), [(60.0, 32.0), (5.0, None)])
def test_an_unload_waits_for_the_engines_requests(tmp_path: Path, drain_secs: float, gone_at: float | None) -> None:
    """It has none when the loader asks, but others that unload may ask with some."""
    fleet = _fleet(tmp_path, '"RTX 4090"', "vram_mb = 20000")
    loop = VirtualTimeLoop()

    async def play() -> float:
        state = Fleet([("solo", "http://solo")], unhealthy_after=1, clock=loop.time)
        neuron = SimulatedNeuron(fleet.file.nodes[0], fleet, state, GroupStarts(), lambda _: None)
        await neuron.load(LoadCommand(model_id="a", instance="1", devices=[0], vram_mb=20000), timeout_secs=9)
        engine = neuron.engines["a", "1"]
        engine.begin(SimulatedRequest(0, "a", 0, 30), 0.0)
        loop.call_at(30, lambda: engine.end_next(30.0))
        await neuron.unload("a", "1", timeout_secs=9, drain_secs=drain_secs)
        assert neuron.engines == {}
        return loop.time()

    if gone_at is None:
        with pytest.raises(NeuronRefused) as refused:
            run_in_virtual_time(play(), loop)
        assert refused.value.code == ErrorCode.MODEL_BUSY
    else:
        assert run_in_virtual_time(play(), loop) == pytest.approx(gone_at, abs=0.1)
