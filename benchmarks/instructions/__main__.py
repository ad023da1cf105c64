"""`python -m benchmarks.instructions`: counts, and compares with the record. Exit code 1 when it has become worse.

With other versions of Python or of a library than the record's there is nothing to compare: it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.contenders.compiled import compiled
from benchmarks.contenders.contender import ContenderUnavailable
from benchmarks.contenders.process import REPOSITORY
from benchmarks.instructions.callgrind import NotAvailable, count
from benchmarks.instructions.record import (
    RECORD,
    TOLERANCE_PCT,
    Record,
    change_pct,
    installed_versions,
    other_versions,
    read_record,
    worse,
    write_record,
)


def counted() -> dict[str, float]:
    """One whole count: of the sources as they are, and of the compiled ones.

    Raises:
        NotAvailable: there is no valgrind, or no C compiler.
    """
    try:
        kinds = {"": REPOSITORY, ", compiled": compiled(REPOSITORY)}
    except ContenderUnavailable as error:
        raise NotAvailable(str(error)) from error
    counts: dict[str, float] = {}
    for kind, packages in kinds.items():
        with tempfile.TemporaryDirectory(prefix="instructions-") as directory:
            found = asyncio.run(count(Path(directory), packages))
        counts |= {name + kind: value for name, value in found.items()}
    return counts


def compare(counts: dict[str, float]) -> int:
    """Prints the counts beside the record; the exit code."""
    if not RECORD.exists():
        print(json.dumps(counts, indent=2), "\nnothing is recorded yet: --record does it")
        return 0
    record = read_record()
    for name, value in counts.items():
        known = record.instructions.get(name)
        beside = "not recorded" if known is None else f"{known:>12,.0f} recorded {change_pct(known, value):+6.1f} %"
        print(f"{name:28}{value:>12,.0f} {beside}")
    differences = other_versions(record.versions, installed_versions())
    if differences:
        print("not compared, the record is of other versions:", *differences, sep="\n  ")
        return 0
    names = worse(record, counts)
    if names:
        print(f"more than {record.tolerance_pct:g} % above the record: {', '.join(names)}")
    return 1 if names else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="what is counted now is the new record")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="count so often and show the spread")
    given = parser.parse_args()
    try:
        runs = [counted() for _ in range(given.repeat)]
    except NotAvailable as reason:
        print(f"instructions cannot be counted here: {reason}")
        return 0
    for name in runs[0] if given.repeat > 1 else ():
        values = sorted(run[name] for run in runs)
        print(f"{name:28}{values[0]:>12,.0f} to {values[-1]:,.0f}: {change_pct(values[0], values[-1]):.2f} %")
    counts = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}
    if given.record:
        write_record(Record(installed_versions(), TOLERANCE_PCT, {n: round(v) for n, v in counts.items()}))
        print(json.dumps(counts, indent=2), f"\nrecorded in {RECORD}")
        return 0
    return compare(counts)


if __name__ == "__main__":
    sys.exit(main())
