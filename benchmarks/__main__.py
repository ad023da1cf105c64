"""`python -m benchmarks`: measures cortex next to nginx and other gateways."""

from __future__ import annotations

import argparse
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
from benchmarks.report.document import write
from benchmarks.report.table import table
from benchmarks.report.targets import targets
from benchmarks.results import Results, load
from benchmarks.runner import Bench
from benchmarks.session import in_own_session


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work and one round, for tuning")
    parser.add_argument("--only", metavar="A,B", help="these contenders only")
    parser.add_argument("--cases", metavar="A,B", help=f"of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, help="how often (3, with --quick 1)")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="the cortex of this checkout")
    parser.add_argument("--baseline", type=Path, help="also the cortex of that checkout, as cortex-base")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, .json and .png")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="JSON", help="measure nothing, take these figures")
    return parser


def _chosen(wanted: str | None, known: list[str], what: str) -> list[str]:
    """Raises SystemExit for one that does not exist."""
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def main() -> int:
    """Exit status 0 whatever the figures are, as long as they could be measured."""
    args = _parser().parse_args()
    if args.earlier:
        return report(load(args.earlier), args)
    return in_own_session(lambda: measure(args))


def measure(args: argparse.Namespace) -> int:
    """Measures, then reports."""
    lineup = contenders(args.checkout.resolve(), args.baseline.resolve() if args.baseline else None)
    names = _chosen(args.only, list(lineup), "contender")
    cases = [CASES[name] for name in _chosen(args.cases, list(CASES), "case")]
    rounds = args.rounds or (1 if args.quick else 3)
    raise_open_files()
    results = Results(machine(args.checkout), {"rounds": rounds, "quick": args.quick})
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
    results.settings["secs"] = round(time.monotonic() - began)
    return report(results, args)


def report(results: Results, args: argparse.Namespace) -> int:
    """Prints the table and the targets; writes the requested files."""
    print(f"\n{table(results)}\n")
    for target in targets(results):
        if target.passed is not None or args.write:
            print(target)
    print(f"{results.settings.get('secs', 0)} s")
    if args.json:
        results.save(args.json)
    if args.write:
        for problem in write(results, REPOSITORY / "docs"):
            print(problem, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
