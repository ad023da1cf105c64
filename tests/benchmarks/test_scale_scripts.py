"""The benchmarks of cold loads and of fleet size measure what they say, on the smallest fleets."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import cold_start, fleet_size
from benchmarks.scale.decisions import time_decisions
from tests.benchmarks import llama_swap_stand_in


async def test_every_contender_is_measured_cold_and_in_a_swap(tmp_path: Path) -> None:
    """Every figure is there for cortex, a start by hand and llama-swap's command line, and the table shows each."""
    stand_in = tmp_path / "llama-swap"
    words = shlex.join([sys.executable, llama_swap_stand_in.__file__])
    stand_in.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    stand_in.chmod(0o700)
    command = ["--load-secs", "0.1", "--rounds", "1", "--crowd", "3", "--llama-swap", str(stand_in)]
    data = await cold_start.run(cold_start.parser().parse_args(command))
    assert list(data["contenders"]) == ["by hand", "cortex", "llama-swap"]
    for parts in data["contenders"].values():
        assert list(parts) == list(cold_start.PARTS)
        assert all(figures["median_ms"] > 0 for figures in parts.values())
    assert data["crowd"]["requests"] == 3
    assert cold_start.table(data).count("\n") == len(cold_start.PARTS) + 3


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
