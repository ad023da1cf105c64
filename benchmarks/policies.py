"""`python -m benchmarks.policies`: the policies of the simulator compared on the example fleet. Prints all figures as
tables, and the ratios of each seed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.simulator.comparison import compare
from cortex.simulator.fleet_file import load_fleet
from cortex.simulator.outcome import Figures, Outcome
from cortex.simulator.report import average, ratio
from cortex.simulator.workload import load_workload

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "simulate"
LOADS = (0.5, 1.0, 2.0)
HEAD = ("load", "policy", "requests", "cold", "loads", "evicted", "unserved", "mean", "p95", "p99", "max")
COUNTS: tuple[Callable[[Figures], float], ...] = (
    lambda f: f.requests,
    lambda f: f.cold_starts,
    lambda f: f.loads,
    lambda f: f.evictions,
    lambda f: f.unserved,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    args = parser.parse_args()
    fleet = load_fleet(EXAMPLE / "fleet.toml")
    workload = load_workload(EXAMPLE / "workload.toml", fleet.catalogue)
    seeds = range(1, args.seeds + 1)
    compared = compare(fleet, workload, seeds, args.loads).outcomes
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += [_row(load, name, each) for load, policies in compared.items() for name, each in policies.items()]
    lines += [
        "",
        f"| load | against | of | all |{''.join(f' {seed} |' for seed in seeds)}",
        "|" + "---|" * (len(seeds) + 4),
    ]
    for load, policies in compared.items():
        for name, each in policies.items():
            if name != "planner":
                for what, figure in (("mean", _mean), ("p99", _p99)):
                    lines.append(_ratios(f"{load:g} | {name} | {what}", policies["planner"], each, figure))
    sys.stdout.write("\n".join(lines) + "\n")


def _mean(figures: Figures) -> float:
    return figures.waiting.mean


def _p99(figures: Figures) -> float:
    return figures.waiting.p99


def _row(load: float, name: str, outcomes: Sequence[Outcome]) -> str:
    cells = [
        f"{load:g}",
        name,
        *(f"{average(outcomes, count):.0f}" for count in COUNTS),
        f"{average(outcomes, _mean):.2f}",
        f"{average(outcomes, lambda f: f.waiting.p95):.1f}",
        f"{average(outcomes, _p99):.1f}",
        f"{average(outcomes, lambda f: f.waiting.max):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(
    label: str, planner: Sequence[Outcome], other: Sequence[Outcome], figure: Callable[[Figures], float]
) -> str:
    """The other policy's waiting time divided by the planner's: over all seeds, then per seed."""
    each = "".join(f" {ratio([theirs], [ours], figure)} |" for ours, theirs in zip(planner, other, strict=True))
    return f"| {label} | {ratio(other, planner, figure)} |{each}"


if __name__ == "__main__":
    main()
