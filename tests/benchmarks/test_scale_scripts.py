"""The benchmarks of cold loads and of fleet size measure what they say, on the smallest fleets."""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest

from benchmarks import cold_load, fleet_size
from benchmarks.scale.decisions import time_decisions


async def test_a_cold_round_adds_up_and_a_crowd_starts_one_engine() -> None:
    """The parts of the overhead add up to the whole, no event is missed, and the model is loaded once."""
    rounds, crowd = await cold_load.measure(cold_load.engine_kind("sim", 0.1), rounds=1, crowd=5)
    parts = rounds[0].parts()
    pieces = ("added before the start", "added to the start", "added by detection", "added to the answer")
    assert sum(parts[name] for name in pieces) == pytest.approx(parts["added, all"])
    assert rounds[0].hand_start > 0.1
    assert crowd.engines == 1
    assert crowd.first <= crowd.last
    assert "5 first requests at once: 1 engine started" in cold_load.table(
        cold_load.result(cold_load.engine_kind("sim", 0.1), rounds, crowd)
    )


async def test_a_pretended_fleet_is_measured_whole() -> None:
    """Its neurons serve, gain a model, die and come back; every figure is there."""
    cpus = sorted(os.sched_getaffinity(0))
    figures = await fleet_size.one_size(3, cpus, idle_secs=0.2, requests=80, settle_secs=0.0)
    assert figures.neurons == 3
    # So short a look at the CPU may find it idle.
    missing = [name for name, value in asdict(figures).items() if value <= 0 and "_cpu_" not in name]
    assert missing == []
    assert figures.death_secs > 0.5  # one missed poll does not mark a neuron as down
    assert fleet_size.table(fleet_size.COLUMNS, [figures]).count("\n") == 2


def test_decisions_are_timed() -> None:
    """Every figure is there, for models that are loaded and for such that are not."""
    found = asdict(time_decisions(3, 20, decisions=200, placements=100))
    assert [name for name, value in found.items() if value <= 0] == []
    assert found["decision_p50_us"] < found["placement_p50_us"]
