"""How long the processes of a load have done nothing. Pure.

A process that waits is never wholly still: a loop that looks for a file ten times a second takes some thousandths of a
core, and a server that is up answers neuron's health checks. So work is CPU time and I/O above a small rate and a small
amount for each check, a process that comes or goes, or output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REPORTED_SECS = 120.0
"""A load that has done nothing for this long is reported."""
_REPORTED_SHARE = 0.2  # of a shorter time after which it is ended

_LEAST_CPU_SHARE = 0.01  # of one core
_LEAST_CPU_SECS = 0.02  # two of the kernel's clock ticks
_LEAST_BYTES_PER_SEC = 64
_CHECK_CPU_SECS = 0.005  # a Python server takes about 1 ms for an answer and a line in its log
_CHECK_BYTES = 2048


@dataclass(frozen=True)
class ProcessWork:
    """What one process has done since its start: CPU time in seconds, and bytes read and written (files, pipes and
    disk; None: the kernel does not say)."""

    cpu_secs: float
    io_bytes: int | None


@dataclass(frozen=True)
class LoadWork:
    """What the processes of a load have done, by pid. `output`: the complete lines so far, without those about health
    checks, and the characters of the line that follows. `checks`: the health checks they have answered."""

    processes: Mapping[int, ProcessWork]
    output: tuple[int, int]
    checks: int = 0


def reported_after(stall_timeout_secs: float) -> float:
    """When a load that does nothing is reported, if it is ended after `stall_timeout_secs` (0: never)."""
    return min(REPORTED_SECS, stall_timeout_secs * _REPORTED_SHARE) if stall_timeout_secs else REPORTED_SECS


class IdleTime:
    """Measures how long a load has done nothing, from what it has done at several moments. Times in seconds."""

    def __init__(self, work: LoadWork, now: float) -> None:
        self._work = work
        self._since = now

    def observe(self, work: LoadWork, now: float) -> float:
        """Seconds since the last work, as of `now`."""
        secs = now - self._since
        if _has_worked(self._work, work, secs):
            self._work, self._since = work, now
            return 0.0
        return secs


def _has_worked(before: LoadWork, after: LoadWork, secs: float) -> bool:
    if before.output != after.output or before.processes.keys() != after.processes.keys():
        return True
    cpu_secs, io_bytes = 0.0, 0
    for pid, work in after.processes.items():
        old = before.processes[pid]
        cpu_secs += work.cpu_secs - old.cpu_secs
        if work.io_bytes is None or old.io_bytes is None:
            return True  # it may read weights all the time
        io_bytes += work.io_bytes - old.io_bytes
    checks = after.checks - before.checks
    least_cpu_secs = max(_LEAST_CPU_SECS, _LEAST_CPU_SHARE * secs) + _CHECK_CPU_SECS * checks
    least_bytes = _LEAST_BYTES_PER_SEC * max(1.0, secs) + _CHECK_BYTES * checks
    # The difference of two sums of clock ticks: no exact comparison.
    return cpu_secs > least_cpu_secs - 1e-6 or io_bytes >= least_bytes
