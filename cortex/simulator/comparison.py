"""Compares the policies over several seeds and loads, in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.outcome import Outcome
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import simulate
from cortex.simulator.statistics import wait_ratio
from cortex.simulator.workload import Workload, make_trace

Comparison = dict[float, dict[str, list[Outcome]]]
"""By load and policy, one outcome a seed."""

NICE = 10
"""Added to the niceness of the processes: a comparison uses all CPUs, and other work on the host goes first."""


def compare(
    fleet: SimulatedFleet,
    workload: Workload,
    seeds: Sequence[int],
    loads: Sequence[float],
    *,
    processes: int | None = None,
) -> Comparison:
    """Simulates every policy with the same requests: those of each seed, at each load.

    Args:
        fleet: the hosts and models.
        workload: what the requests are generated from.
        seeds: one simulation each.
        loads: each multiplies the workload's sessions.
        processes: how many simulations run at once; by default one for each CPU of this process.
    """
    cases = list(product(loads, seeds, POLICIES))
    # Most requests first, so that no process is left with a long simulation at the end.
    order = sorted(cases, key=lambda case: -case[0])
    count = min(processes or len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_set_up, initargs=(fleet, workload)
    ) as pool:
        outcomes = dict(zip(order, pool.map(_simulate, order), strict=True))
    return {load: {name: [outcomes[load, seed, name] for seed in seeds] for name in POLICIES} for load in loads}


def as_json(compared: Comparison) -> dict[str, Any]:
    """By load and policy: the mean and the 99th percentile of the wait in seconds, one of each for a seed; and the
    ratio of their averages to the planner's with its 95 % interval, null where there is none."""
    return {
        f"{load:g}": {name: _policy_json(outcomes, policies["planner"]) for name, outcomes in policies.items()}
        for load, policies in compared.items()
    }


def waits(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """The mean and the 99th percentile of the wait, in seconds, one of each for a seed."""
    return {
        "mean": [each.total.waiting.mean for each in outcomes],
        "p99": [each.total.waiting.p99 for each in outcomes],
    }


def _policy_json(outcomes: Sequence[Outcome], planner: Sequence[Outcome]) -> dict[str, Any]:
    ours, theirs = waits(planner), waits(outcomes)
    fields: dict[str, Any] = {f"{what}_wait_secs": secs for what, secs in theirs.items()}
    for what, secs in theirs.items():
        ratio = wait_ratio(secs, ours[what])
        fields[f"{what}_ratio"] = None if ratio is None else ratio.value
        fields[f"{what}_ratio_interval_95"] = None if ratio is None else ratio.interval
    return fields


_shared: tuple[SimulatedFleet, Workload]
"""What all simulations of a process have in common."""


def _set_up(fleet: SimulatedFleet, workload: Workload) -> None:
    global _shared  # noqa: PLW0603 - a pool's initializer has no other way to keep it
    _ = os.nice(NICE)
    _shared = fleet, workload


def _simulate(case: tuple[float, int, str]) -> Outcome:
    (load, seed, policy), (fleet, workload) = case, _shared
    return simulate(fleet, make_trace(workload, fleet.catalogue, seed=seed, load=load), policy)
