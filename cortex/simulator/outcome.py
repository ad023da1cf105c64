"""What came of a simulation, in figures. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cortex.simulator.engine import Request


@dataclass(frozen=True)
class Waiting:
    """Seconds from a request's arrival to its engine's beginning with it, over all requests, also those that found
    their model loaded. Who was never served waited until he gave up."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


@dataclass(frozen=True)
class Figures:
    """CountTotals of one simulation, or of one model in it.

    `cold_starts` are requests that waited for their model; `displacements` models that made way, `hot_displacements`
    those of them that were used less than `RECENT_SECS` before.
    """

    requests: int
    cold_starts: int
    loads: int
    displacements: int
    hot_displacements: int
    unserved: int
    waiting: Waiting


@dataclass(frozen=True)
class Outcome:
    """One policy's simulation. `vram_loaded_pct` is the share of the fleet's memory that models held, on average over
    the time; `vram_in_use_pct` the share held by models that worked on a request."""

    policy: str
    total: Figures
    by_model: dict[str, Figures]
    secs: float
    vram_loaded_pct: float
    vram_in_use_pct: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class CountTotals:
    """Counted while the simulation runs, by model."""

    loads: Counter[str] = field(default_factory=Counter)
    displacements: Counter[str] = field(default_factory=Counter)
    hot_displacements: Counter[str] = field(default_factory=Counter)


class MemoryUse:
    """Integrates over the time what models hold, and what those hold that work."""

    def __init__(self, total_mb: int) -> None:
        self._total_mb = total_mb
        self._held_mb = 0
        self._working_mb = 0
        self._held = 0.0
        self._working = 0.0
        self._as_of = 0.0

    def change(self, now: float, *, held_mb: int = 0, working_mb: int = 0) -> None:
        """From now on, models hold so much more."""
        self._accrue(now)
        self._held_mb += held_mb
        self._working_mb += working_mb

    def shares(self, now: float) -> tuple[float, float]:
        """(held, working) in per cent of the fleet's memory, on average until now."""
        self._accrue(now)
        whole = self._total_mb * now
        return (100 * self._held / whole, 100 * self._working / whole) if whole else (0.0, 0.0)

    def _accrue(self, now: float) -> None:
        self._held += self._held_mb * (now - self._as_of)
        self._working += self._working_mb * (now - self._as_of)
        self._as_of = now


def figures(requests: Iterable[Request], counts: CountTotals, models: Iterable[str]) -> Figures:
    """The figures of these requests and models."""
    listed, names = list(requests), list(models)
    return Figures(
        requests=len(listed),
        cold_starts=sum(request.cold for request in listed),
        loads=sum(counts.loads[name] for name in names),
        displacements=sum(counts.displacements[name] for name in names),
        hot_displacements=sum(counts.hot_displacements[name] for name in names),
        unserved=sum(request.begun is None for request in listed),
        waiting=waiting([request.waited for request in listed]),
    )


def waiting(secs: Sequence[float]) -> Waiting:
    """Nearest-rank percentiles."""
    if not secs:
        return Waiting()
    ordered = sorted(secs)
    p50, p95, p99 = (ordered[max(0, math.ceil(len(ordered) * share) - 1)] for share in (0.5, 0.95, 0.99))
    return Waiting(math.fsum(ordered) / len(ordered), p50, p95, p99, ordered[-1])
