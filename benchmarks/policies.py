"""`python -m benchmarks.policies`: compares the planner with LRU and first-fit, simulated on the example fleet, for
many seeds and several loads. Prints the tables of docs/simulate.md."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.simulator.fleet_file import load_fleet
from cortex.simulator.outcome import Outcome
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import simulate
from cortex.simulator.workload import load_workload, make_trace

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "simulate"
LOADS = (0.5, 1.0, 2.0)
HEAD = ("load", "policy", "requests", "cold", "loads", "displaced", "unserved", "mean", "p95", "p99", "max")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    args = parser.parse_args()
    fleet = load_fleet(EXAMPLE / "fleet.toml")
    workload = load_workload(EXAMPLE / "workload.toml", fleet.catalogue)
    _say("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    ratios: list[str] = []
    for load in args.loads:
        outcomes: dict[str, list[Outcome]] = {name: [] for name in POLICIES}
        for seed in range(1, args.seeds + 1):
            trace = make_trace(workload, fleet.catalogue, seed=seed, load=load)
            for name in POLICIES:
                outcomes[name].append(simulate(fleet, trace, name))
        for name, each in outcomes.items():
            _say(_row(load, name, each))
        planner = outcomes["planner"]
        for name in POLICIES:
            if name != "planner":
                ratios.append(
                    _ratios(f"{load:g} | {name} | mean", planner, outcomes[name], lambda o: o.total.waiting.mean)
                )
                ratios.append(
                    _ratios(f"{load:g} | {name} | p99", planner, outcomes[name], lambda o: o.total.waiting.p99)
                )
    seeds = "".join(f" {seed} |" for seed in range(1, args.seeds + 1))
    _say(f"\n| load | against | of | all |{seeds}\n|" + "---|" * (args.seeds + 4) + "\n" + "\n".join(ratios))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _row(load: float, name: str, outcomes: Sequence[Outcome]) -> str:
    def mean(figure: Callable[[Outcome], float]) -> float:
        return statistics.fmean(map(figure, outcomes))

    counts = (
        mean(lambda o: o.total.requests),
        mean(lambda o: o.total.cold_starts),
        mean(lambda o: o.total.loads),
        mean(lambda o: o.total.displacements),
        mean(lambda o: o.total.unserved),
    )
    secs = (
        mean(lambda o: o.total.waiting.mean),
        mean(lambda o: o.total.waiting.p95),
        mean(lambda o: o.total.waiting.p99),
        mean(lambda o: o.total.waiting.max),
    )
    cells = [
        f"{load:g}",
        name,
        *(f"{count:.0f}" for count in counts),
        f"{secs[0]:.2f}",
        *(f"{s:.1f}" for s in secs[1:]),
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(
    label: str, planner: Sequence[Outcome], other: Sequence[Outcome], figure: Callable[[Outcome], float]
) -> str:
    """The other policy's waiting time divided by the planner's: over all seeds, then per seed."""
    each = [figure(theirs) / figure(ours) for ours, theirs in zip(planner, other, strict=True)]
    whole = statistics.fmean(map(figure, other)) / statistics.fmean(map(figure, planner))
    return f"| {label} | {whole:.2f} |" + "".join(f" {ratio:.2f} |" for ratio in each)


if __name__ == "__main__":
    main()
