"""Compares the policies over several seeds and loads, in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

from cortex.simulator.bound import wait_bound
from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.outcome import Outcome, WaitFigures
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import simulate
from cortex.simulator.statistics import wait_ratio
from cortex.simulator.workload import Workload, make_trace

NICE = 10
"""Added to the niceness of the processes: a comparison uses all CPUs, and other work on the host goes first."""

BOUND = "bound"
"""The name of the bound beside the policies."""


@dataclass(frozen=True)
class Comparison:
    """By load and policy, one outcome a seed; by load, one bound a seed, if bounds were asked for."""

    outcomes: dict[float, dict[str, list[Outcome]]]
    bounds: dict[float, list[WaitFigures]]

    def waits(self, load: float) -> dict[str, list[WaitFigures]]:
        """By policy, the planner first, and last under `BOUND` if there is one: the figures, one of each for a seed."""
        found = {name: [each.total.waiting for each in outcomes] for name, outcomes in self.outcomes[load].items()}
        return {**found, BOUND: self.bounds[load]} if self.bounds else found


def compare(
    fleet: SimulatedFleet,
    workload: Workload,
    seeds: Sequence[int],
    loads: Sequence[float],
    *,
    processes: int | None = None,
    bound: bool = False,
) -> Comparison:
    """Simulates every policy with the same requests: those of each seed, at each load, as if of one caller.

    Args:
        fleet: the hosts and models.
        workload: what the requests are generated from.
        seeds: one simulation each.
        loads: each multiplies the workload's sessions.
        processes: how many simulations run at once; by default one for each CPU of this process.
        bound: also finds what no policy can beat.
    """
    cases = list(product(loads, seeds, POLICIES))
    # Most requests first, so that no process is left with a long simulation at the end.
    order = sorted(cases, key=lambda case: -case[0])
    count = min(processes or len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_set_up, initargs=(fleet, workload)
    ) as pool:
        found = dict(zip(order, pool.map(_simulate, order), strict=True))
        outcomes = {load: {name: [found[load, seed, name] for seed in seeds] for name in POLICIES} for load in loads}
        bounds: dict[float, list[WaitFigures]] = {}
        for load in loads if bound else ():
            means = [min(found[load, seed, name].total.waiting.mean for name in POLICIES) for seed in seeds]
            bounds[load] = list(pool.map(_find_bound, [load] * len(seeds), seeds, means))
    return Comparison(outcomes, bounds)


def as_json(compared: Comparison) -> dict[str, Any]:
    """By load and policy: the mean and the 99th percentile of the wait in seconds, one of each for a seed; and the
    ratio of their averages to the planner's with its 95 % interval, null where there is none."""
    found: dict[str, Any] = {}
    for load in compared.outcomes:
        waits = compared.waits(load)
        found[f"{load:g}"] = {name: _waits_json(each, waits["planner"]) for name, each in waits.items()}
    return found


def _waits_json(waits: Sequence[WaitFigures], planner: Sequence[WaitFigures]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "mean_wait_secs": [each.mean for each in waits],
        "p99_wait_secs": [each.p99 for each in waits],
    }
    ratios = (
        ("mean_ratio", wait_ratio([each.mean for each in waits], [each.mean for each in planner])),
        ("p99_ratio", wait_ratio([each.p99 for each in waits], [each.p99 for each in planner])),
    )
    for key, ratio in ratios:
        fields[key] = None if ratio is None else ratio.value
        fields[f"{key}_interval_95"] = None if ratio is None else ratio.interval
    return fields


_shared: tuple[SimulatedFleet, Workload]
"""What all simulations of a process have in common."""


def _set_up(fleet: SimulatedFleet, workload: Workload) -> None:
    global _shared  # noqa: PLW0603 - a pool's initializer has no other way to keep it
    _ = os.nice(NICE)
    _shared = fleet, workload


def _simulate(case: tuple[float, int, str]) -> Outcome:
    (load, seed, policy), (fleet, workload) = case, _shared
    return simulate(fleet, make_trace(workload, fleet.catalogue, seed=seed, load=load), policy, fair=False)


def _find_bound(load: float, seed: int, reached_secs: float) -> WaitFigures:
    fleet, workload = _shared
    return wait_bound(fleet, make_trace(workload, fleet.catalogue, seed=seed, load=load), aim_secs=reached_secs)
