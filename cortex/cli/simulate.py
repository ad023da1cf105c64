"""`cortex simulate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.policies import POLICIES
from cortex.simulator.report import by_model, side_by_side
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from cortex.simulator.world import simulate
from shared.settings import SettingsError

EVERY = "all"


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
    outcomes = [simulate(fleet, asks, POLICIES[name]()) for name in names]
    if args.json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
        return 0
    print(side_by_side(outcomes))
    for outcome in outcomes if args.by_model else ():
        print("\n" + by_model(outcome))
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
