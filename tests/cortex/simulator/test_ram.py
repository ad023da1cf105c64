"""Models on the CPU in `cortex simulate`: RAM is one more capacity, which unified devices share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.simulator.policies import POLICIES
from cortex.simulator.trace import Ask
from shared.protocol import RAM
from shared.settings import SettingsError
from tests.cortex.simulator.test_simulator import fleet_of, run, waits

LOADS = "load_secs = { base = 10, per_gb = 0, unload = 2 }\n"
IN_RAM = '[[models]]\nid = "{0}"\ndevices = 0\nvram_mb = {1}\n'
ON_GPU = '[[models]]\nid = "{0}"\nvram_mb = {1}\n'


@pytest.mark.parametrize("policy", POLICIES)
def test_models_take_turns_in_ram(tmp_path: Path, policy: str) -> None:
    """Two that do not fit together; one on the GPU of the same host stays."""
    nodes = 'nodes = [{ name = "box", devices = ["RTX 3060"], ram_mb = 64000 }]\n'
    models = IN_RAM.format("a", 40_000) + IN_RAM.format("b", 40_000) + ON_GPU.format("g", 8_000)
    fleet = fleet_of(tmp_path, nodes + LOADS + models)
    asks = [Ask(at, model, 1.0) for at, model in ((0, "g"), (100, "a"), (300, "b"), (500, "a"), (600, "g"))]
    assert waits(fleet, asks, policy) == pytest.approx([10, 10, 12, 12, 0], abs=0.6)


def test_a_unified_device_and_the_cpu_share_the_ram(tmp_path: Path) -> None:
    """A model on the CPU makes room for one on the GPU."""
    nodes = 'nodes = [{ name = "spark", devices = ["GB10"] }]\n'
    fleet = fleet_of(tmp_path, nodes + LOADS + IN_RAM.format("c", 60_000) + ON_GPU.format("g", 80_000))
    simulation, _ = run(fleet, [Ask(0, "c", 1.0), Ask(200, "g", 1.0)], "planner")
    neuron = simulation.neurons["spark"]
    assert [engine.model_id for engine in neuron.engines.values()] == ["g"]
    assert neuron.bookable_mb(RAM) == neuron.bookable_mb(0) == 122_570 - 4_096 - 80_000


def test_a_host_needs_devices_or_ram(tmp_path: Path) -> None:
    nodes = 'nodes = [{ name = "box" }]\n'
    with pytest.raises(SettingsError, match="neither devices nor ram_mb"):
        fleet_of(tmp_path, nodes + LOADS + IN_RAM.format("a", 1000))
