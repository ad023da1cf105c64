"""`cortex simulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.policies import POLICIES
from cortex.simulator.report import by_model, side_by_side
from cortex.simulator.simulation import simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.workload import load_workload, make_trace
from shared.command_line import fail
from shared.settings import SettingsError


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
    as_json: bool,
) -> int:
    """Simulates one policy or "all" and prints the outcome, or only writes the requests to `made_trace`; the exit
    status. Either `trace` or `workload` is given."""
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
    outcomes = [simulate(fleet, asks, name) for name in names]
    if as_json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
        return 0
    print(side_by_side(outcomes))
    for outcome in outcomes if each_model else ():
        print("\n" + by_model(outcome))
    return 0


def _requests(fleet: SimulatedFleet, trace: Path | None, workload: Path | None, *, seed: int, load: float) -> list[Ask]:
    if trace is not None:
        return read_trace(trace, fleet.catalogue)
    assert workload is not None
    return make_trace(load_workload(workload, fleet.catalogue), fleet.catalogue, seed=seed, load=load)
