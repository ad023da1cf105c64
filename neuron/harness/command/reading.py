"""What the output of a described engine says: how far its load is, and why it ended. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from neuron.config import ErrorPattern, ProgressPattern
from neuron.progress.phases import STARTING, rank
from shared.protocol import FailureCause

_MAX_MESSAGE: Final = 200  # characters
_MAX_CAUSE: Final = 1000
_CAUSE_LINES: Final = 300
"""Of the end of the output: every pattern may look at all of them, while neuron does nothing else."""
_AROUND: Final = " \t│"  # Python's command lines draw a box around their errors
_GENERAL_ERRORS: Final = (
    ErrorPattern(pattern=r"(?i)out of memory|OutOfMemory|cannot allocate memory|bad_alloc", cause="node"),
    ErrorPattern(pattern=r"(?i)no space left on device|read-only file system|disk quota exceeded", cause="node"),
    ErrorPattern(pattern=r"(?i)cannot open shared object file|ModuleNotFoundError|ImportError", cause="node"),
    ErrorPattern(pattern=r"(?i)CUDA error|CUDA driver|no CUDA-capable device|ROCm error|HIP error", cause="node"),
    ErrorPattern(pattern=r"(?i)address already in use|EADDRINUSE", cause="node"),
    ErrorPattern(
        pattern=r"(?i)unrecognized arguments|unknown argument|invalid argument:|unexpected argument|no such option",
        cause="model",
    ),
    ErrorPattern(pattern=r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)(?::|$)"),  # a Python traceback's last line
    ErrorPattern(pattern=r"(?i)^\W*(?:fatal|panic|error)\b.*:"),
)
"""Looked for after the engine's own, in this order."""


@dataclass(frozen=True)
class DescribedLoadReading:
    """See `LoadReading`: the last line that one of `patterns` matched. A line of an earlier phase changes nothing."""

    patterns: tuple[ProgressPattern, ...]
    ready_pattern: str | None
    phase: str = STARTING
    fraction: float | None = None
    message: str | None = None
    serving: bool = False
    downloaded_secs: float | None = None

    def after(self, line: str) -> DescribedLoadReading:
        """The reading after one more line of output."""
        if self.ready_pattern is not None and re.search(self.ready_pattern, line):
            return replace(self, serving=True)
        for each in self.patterns:
            found = re.search(each.pattern, line)
            if found is not None:
                return self._at(each.phase, _share(found), line.strip()[:_MAX_MESSAGE])
        return self

    def _at(self, phase: str, fraction: float | None, message: str) -> DescribedLoadReading:
        if rank(phase) < rank(self.phase):
            return self
        if phase == self.phase and self.fraction is not None:
            fraction = max(self.fraction, fraction or 0.0)
        return replace(self, phase=phase, fraction=fraction, message=message)


def _share(found: re.Match[str]) -> float | None:
    """The group `percent` of a match, as a share; None without one, or when it is not a number."""
    try:
        return min(max(float(found["percent"]) / 100, 0.0), 1.0)
    except (IndexError, TypeError, ValueError):
        return None


def root_cause(lines: Sequence[str], errors: Sequence[ErrorPattern]) -> str | None:
    """The line that says why the engine ended: the last one that matches the first pattern that any matches; None when
    none does."""
    shortened = [line.strip(_AROUND)[:_MAX_CAUSE] for line in lines[-_CAUSE_LINES:]]
    for each in (*errors, *_GENERAL_ERRORS):
        found = next((line for line in reversed(shortened) if re.search(each.pattern, line)), None)
        if found is not None:
            return found
    return None


def failure_of(error: str, errors: Sequence[ErrorPattern]) -> tuple[FailureCause, bool]:
    """Who is at fault for a line from `root_cause`, and whether the next start would fail in the same way."""
    for each in (*errors, *_GENERAL_ERRORS):
        if re.search(each.pattern, error):
            cause = FailureCause(each.cause)
            return cause, each.permanent or cause is FailureCause.MODEL
    return FailureCause.UNKNOWN, False
