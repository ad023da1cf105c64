"""What the checks found, and how it is printed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from shared.terminal.wording import counted


class Verdict(str, Enum):
    """How bad a finding is. A fault ends in exit status 1."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


class Finding(NamedTuple):
    """One line of the report. `subject`: a file, a neuron's name, or the like. `advice`: what to do; "" if nothing."""

    verdict: Verdict
    subject: str
    text: str
    advice: str = ""

    @property
    def line(self) -> str:
        rest = f"; {self.advice}" if self.advice else ""
        return f"{self.verdict.value:<8} {self.subject}: {self.text}{rest}"


def ok(subject: str, text: str) -> Finding:
    return Finding(Verdict.OK, subject, text)


def warning(subject: str, text: str, advice: str = "") -> Finding:
    return Finding(Verdict.WARNING, subject, text, advice)


def fault(subject: str, text: str, advice: str = "") -> Finding:
    return Finding(Verdict.FAULT, subject, text, advice)


def has_fault(findings: Sequence[Finding]) -> bool:
    return any(each.verdict is Verdict.FAULT for each in findings)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = Counter(each.verdict for each in findings)
    faults, warnings = counts[Verdict.FAULT], counts[Verdict.WARNING]
    return f"{counted(faults, 'fault')}, {counted(warnings, 'warning')}, {counts[Verdict.OK]} ok"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "ok": not has_fault(findings),
        "findings": [
            {**each._asdict(), "verdict": each.verdict.value, "advice": each.advice or None} for each in findings
        ],
    }
