"""`python -m benchmarks`: measures cortex beside nginx and other gateways."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cases.all import CASES
from benchmarks.contenders.all import contenders
from benchmarks.contenders.process import REPOSITORY
from benchmarks.limits import raise_open_files
from benchmarks.loops import run
from benchmarks.measure.machine import machine
from benchmarks.report.bars import bars
from benchmarks.report.table import table
from benchmarks.results import Results
from benchmarks.runner import Bench


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work and one round, for tuning")
    parser.add_argument("--only", metavar="A,B", help="these contenders only")
    parser.add_argument("--cases", metavar="A,B", help=f"of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, help="how often (3, with --quick 1)")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="the cortex of this checkout")
    parser.add_argument("--baseline", type=Path, help="also the cortex of that checkout, as cortex-base")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def _chosen(wanted: str | None, known: list[str], what: str) -> list[str]:
    """Raises SystemExit for one that does not exist."""
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def main() -> int:
    """Exit status 0 when everything asked for was measured, whatever the figures are."""
    args = _parser().parse_args()
    lineup = contenders(args.checkout.resolve(), args.baseline.resolve() if args.baseline else None)
    names = _chosen(args.only, list(lineup), "contender")
    cases = [CASES[name] for name in _chosen(args.cases, list(CASES), "case")]
    rounds = args.rounds or (1 if args.quick else 3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    raise_open_files()
    results = Results(machine(), {"rounds": rounds, "quick": args.quick})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as directory:
        bench = Bench(
            [lineup[name] for name in names],
            cases,
            rounds,
            args.quick,
            Path(directory),
            lambda line: print(line, flush=True),
        )
        run(bench.run(results))
    print(f"\n{table(results)}\n")
    for bar in bars(results):
        if bar.passed is not None:
            print(bar)
    print(f"{time.monotonic() - began:.0f} s")
    if args.json:
        results.save(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
