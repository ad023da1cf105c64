"""`cortex simulate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cortex.cli.tables import table
from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.outcome import Figures, Outcome
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from shared.settings import SettingsError

EVERY = "all"

_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("requests", lambda f: str(f.requests)),
    ("cold starts", lambda f: str(f.cold_starts)),
    ("loads", lambda f: str(f.loads)),
    ("displacements", lambda f: str(f.displacements)),
    ("  of hot models", lambda f: str(f.hot_displacements)),
    ("unserved", lambda f: str(f.unserved)),
    ("waiting, mean", lambda f: f"{f.waiting.mean:.2f} s"),
    ("  p50", lambda f: f"{f.waiting.p50:.1f} s"),
    ("  p95", lambda f: f"{f.waiting.p95:.1f} s"),
    ("  p99", lambda f: f"{f.waiting.p99:.1f} s"),
    ("  max", lambda f: f"{f.waiting.max:.1f} s"),
)


def add_simulate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser of `cortex`."""
    parser = commands.add_parser("simulate", help="replay a trace of requests over a fleet that is not there")
    parser.add_argument("--fleet", type=Path, required=True, metavar="FILE", help="hosts, models, load times")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="the requests: JSON lines, or CSV")
    source.add_argument("--workload", type=Path, metavar="FILE", help="make the requests from this description")
    parser.add_argument("--seed", type=int, default=1, help="of the requests made (default: %(default)s)")
    parser.add_argument("--load", type=_factor, default=1.0, metavar="X", help="X times as many sessions")
    parser.add_argument("--make-trace", type=Path, metavar="FILE", help="write the requests there, simulate nothing")
    parser.add_argument(
        "--policy", choices=[*POLICIES, EVERY], default=EVERY, help="who decides (default: each, side by side)"
    )
    parser.add_argument("--by-model", action="store_true", help="a line for each model")
    parser.add_argument("--json", action="store_true", help="the figures as JSON, for scripts")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        fleet = load_fleet(args.fleet)
        asks = _requests(args, fleet)
        if args.make_trace is not None:
            write_trace(args.make_trace, asks)
            print(f"{args.make_trace}: {len(asks)} requests", file=sys.stderr)
            return 0
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cortex: {error}", file=sys.stderr)
        return 1
    names = list(POLICIES) if args.policy == EVERY else [args.policy]
    outcomes = [simulate(fleet, asks, name) for name in names]
    if args.json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
        return 0
    print(_side_by_side(outcomes))
    for outcome in outcomes if args.by_model else ():
        print("\n" + _by_model(outcome))
    return 0


def _requests(args: argparse.Namespace, fleet: SimulatedFleet) -> list[Ask]:
    if args.trace is not None:
        return read_trace(args.trace, fleet.catalogue)
    workload = load_workload(args.workload, fleet.catalogue)
    return make_trace(workload, fleet.catalogue, seed=args.seed, load=args.load)


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


def _side_by_side(outcomes: Sequence[Outcome]) -> str:
    """A column for each policy."""
    rows: list[list[str]] = [[label, *(show(each.total) for each in outcomes)] for label, show in _ROWS]
    rows.append(["VRAM loaded", *(f"{each.vram_loaded_pct:.1f} %" for each in outcomes)])
    rows.append(["VRAM in use", *(f"{each.vram_in_use_pct:.1f} %" for each in outcomes)])
    return table(["", *(each.policy for each in outcomes)], rows)


def _by_model(outcome: Outcome) -> str:
    """A line for each model that was asked for."""
    rows = [
        [
            model,
            each.requests,
            each.cold_starts,
            each.loads,
            each.displacements,
            each.unserved,
            f"{each.waiting.mean:.2f} s",
            f"{each.waiting.p99:.1f} s",
            f"{each.waiting.max:.1f} s",
        ]
        for model, each in sorted(outcome.by_model.items(), key=lambda item: (-item[1].requests, item[0]))
    ]
    head = ["REQUESTS", "COLD", "LOADS", "DISPLACED", "UNSERVED", "MEAN", "P99", "MAX"]
    return table([outcome.policy.upper(), *head], rows)
