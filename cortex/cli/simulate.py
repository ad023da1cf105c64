"""`cortex simulate`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from cortex.simulator.comparison import as_json as comparison_as_json
from cortex.simulator.comparison import compare
from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.policies import POLICIES
from cortex.simulator.report import by_key, by_model, comparison, side_by_side
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from shared.settings import SettingsError
from shared.terminal.command_line import fail

MAX_LOAD = 1e6
MAX_SEEDS = 1000


def parsed_seeds(text: str) -> list[int]:
    """The seeds of `A-B`, both included.

    Raises:
        typer.BadParameter: the text is not such a range.
    """
    matched = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    first, last = (int(matched[1]), int(matched[2])) if matched else (1, 0)
    if not first <= last < first + MAX_SEEDS:
        raise typer.BadParameter(f"--seeds must be a range such as 1-10, of at most {MAX_SEEDS} seeds, got {text!r}")
    return list(range(first, last + 1))


def parsed_loads(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated list.

    Raises:
        typer.BadParameter: one of them is not a load.
    """
    try:
        loads = [float(each) for each in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0 < each < MAX_LOAD for each in loads):
        raise typer.BadParameter(f"{option} must be above 0 and below {MAX_LOAD:.0f}, got {text}")
    return loads


def run_comparison(
    fleet_file: Path, workload_file: Path, *, seeds: Sequence[int], loads: Sequence[float], bound: bool, as_json: bool
) -> int:
    """Simulates every policy for every seed and load and prints the comparison, with the bound if wanted; the exit
    status."""
    try:
        fleet = load_fleet(fleet_file)
        workload = load_workload(workload_file, fleet.catalogue)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    compared = compare(fleet, workload, seeds, loads, bound=bound)
    print(json.dumps(comparison_as_json(compared), indent=2) if as_json else comparison(compared))
    return 0


def run_simulate(
    fleet_file: Path,
    *,
    trace: Path | None,
    workload: Path | None,
    seed: int,
    load: float,
    made_trace: Path | None,
    policy: str,
    each_model: bool,
    fair: bool,
    as_json: bool,
) -> int:
    """Simulates one policy or "all" and prints the outcome, or only writes the requests to `made_trace`; the exit
    status. Either `trace` or `workload` is given. `fair`: keys take turns."""
    try:
        fleet = load_fleet(fleet_file)
        asks = _requests(fleet, trace, workload, seed=seed, load=load)
        if made_trace is not None:
            write_trace(made_trace, asks)
            print(f"{made_trace}: {len(asks)} requests", file=sys.stderr)
            return 0
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        fail("cortex", error)
    names = list(POLICIES) if policy == "all" else [policy]
    outcomes = [simulate(fleet, asks, name, fair=fair) for name in names]
    if as_json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
        return 0
    print(side_by_side(outcomes))
    if outcomes[0].waiting_by_key:
        print("\n" + by_key(outcomes))
    for outcome in outcomes if each_model else ():
        print("\n" + by_model(outcome))
    return 0


def _requests(fleet: SimulatedFleet, trace: Path | None, workload: Path | None, *, seed: int, load: float) -> list[Ask]:
    if trace is not None:
        return read_trace(trace, fleet.catalogue)
    assert workload is not None
    return make_trace(load_workload(workload, fleet.catalogue), fleet.catalogue, seed=seed, load=load)
