"""Everything needed to understand and repeat a run, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.e2e.chaos.faults import Fault
from tests.e2e.chaos.fleet import Fleet
from tests.e2e.chaos.invariants import Watch
from tests.e2e.chaos.load import Answered
from tests.e2e.chaos.outcomes import Kind
from tests.e2e.chaos.verdict import Verdict

_SHOWN = 40
_BEFORE_SECS = 3.0  # a fault up to this long before a request's end may be its cause


def write(directory: Path, answers: Sequence[Answered], faults: Sequence[Fault], start: float) -> None:
    """Writes a line for every request and every fault, next to the services' logs."""
    ordered = sorted(answers, key=lambda answer: answer.since)
    (directory / "requests.txt").write_text("\n".join(answer.line(start) for answer in ordered))
    (directory / "faults.txt").write_text("\n".join(timeline(faults, start)))


def timeline(faults: Sequence[Fault], start: float) -> list[str]:
    return [fault.line(start) for fault in sorted(faults, key=lambda fault: fault.at)]


def summary(verdict: Verdict, answers: Sequence[Answered], watch: Watch) -> str:
    """A few lines: how many requests ended in which way, how long they took, and how many engines ran."""
    kinds = Counter(f"{each.outcome.kind.value} {each.outcome.code}".strip() for each in answers)
    took = sorted(each.until - each.since for each in answers if each.outcome.kind is Kind.COMPLETE)
    quantiles = " / ".join(f"{took[min(int(len(took) * q), len(took) - 1)]:.2f}" for q in (0.5, 0.9, 0.99, 1)) or "-"
    missed = Counter(f"{each.asked.model_id} {each.outcome.code}" for each in verdict.failures)
    return "\n".join(
        (
            f"{verdict.succeeded} of {len(verdict.counted)} requests that count succeeded ({verdict.share:.2%}); "
            f"{verdict.lost} more were lost with their engine after the first byte, {verdict.barred} had no host left",
            f"{len(answers)} requests: {_listed(kinds)}",
            f"failures that count: {_listed(missed) or 'none'}",
            f"seconds of a complete answer, p50 / p90 / p99 / longest: {quantiles if took else '-'}",
            f"engines: {watch.started} were started, at most {watch.most_engines} ran at once; {watch.checks} checks",
        )
    )


def details(fleet: Fleet, verdict: Verdict, faults: Sequence[Fault], start: float) -> str:
    """The timeline, the failed requests with the faults around them, and the ends of all logs."""
    sections = [
        ("faults", timeline(faults, start)),
        ("violations", list(_explained(verdict.violations, faults, start))),
        ("failures that count", list(_explained(verdict.failures[:_SHOWN], faults, start))),
        *((service.name, [service.tail()]) for service in fleet.services),
    ]
    return "\n".join(f"\n{title}:\n" + "\n".join(lines or ["none"]) for title, lines in sections)


def _explained(answers: Sequence[Answered], faults: Sequence[Fault], start: float) -> Iterator[str]:
    for answer in answers:
        yield answer.line(start)
        for fault in faults:
            if fault.at <= answer.until and fault.until + _BEFORE_SECS >= answer.since:
                yield f"        {fault.line(start)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())
