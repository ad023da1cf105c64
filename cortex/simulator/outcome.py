"""The figures of a simulation. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cortex.simulator.engine import SimulatedRequest

_JSON_NAMES = {"evictions": "displacements", "hot_evictions": "hot_displacements"}
"""Names in the JSON of `cortex simulate`, which scripts read, where they differ from the fields."""


@dataclass(frozen=True)
class WaitFigures:
    """Seconds from a request's arrival until its engine starts on it, over all requests, warm ones included. For an
    unserved request, until it was refused or timed out."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Figures of one simulation, or of one model in it.

    `cold_starts` are requests that waited for their model; `hot_evictions` are those of models that were used within
    the last `RECENT_SECS`.
    """

    requests: int
    cold_starts: int
    loads: int
    evictions: int
    hot_evictions: int
    unserved: int
    waiting: WaitFigures


@dataclass(frozen=True)
class Outcome:
    """One policy's simulation. `waiting_by_key` is by name of the API key, for requests that have one.
    `vram_loaded_pct` is the share of the fleet's memory that models held, averaged over time; `vram_in_use_pct` the
    share held by models with a running request."""

    policy: str
    total: Figures
    by_model: dict[str, Figures]
    waiting_by_key: dict[str, WaitFigures]
    secs: float
    vram_loaded_pct: float
    vram_in_use_pct: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self, dict_factory=lambda fields: {_JSON_NAMES.get(name, name): value for name, value in fields})


@dataclass
class EventCounts:
    """Events during the simulation, by model."""

    loads: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    hot_evictions: Counter[str] = field(default_factory=Counter)


class MemoryUse:
    """Integrates over time the memory of loaded models, and of models with a running request."""

    def __init__(self, total_mb: int) -> None:
        self._total_mb = total_mb
        self._held_mb = 0
        self._working_mb = 0
        self._held = 0.0
        self._working = 0.0
        self._as_of = 0.0

    def change(self, now: float, *, held_mb: int = 0, working_mb: int = 0) -> None:
        """Adjusts what models hold from now on, in MiB."""
        self._accrue(now)
        self._held_mb += held_mb
        self._working_mb += working_mb

    def shares(self, now: float) -> tuple[float, float]:
        """(held, working) as a percentage of the fleet's memory, averaged until now."""
        self._accrue(now)
        whole = self._total_mb * now
        return (100 * self._held / whole, 100 * self._working / whole) if whole else (0.0, 0.0)

    def _accrue(self, now: float) -> None:
        self._held += self._held_mb * (now - self._as_of)
        self._working += self._working_mb * (now - self._as_of)
        self._as_of = now


def figures(requests: Iterable[SimulatedRequest], counts: EventCounts, models: Iterable[str]) -> Figures:
    """The figures of these requests and models."""
    listed, names = list(requests), list(models)
    return Figures(
        requests=len(listed),
        cold_starts=sum(request.cold for request in listed),
        loads=sum(counts.loads[name] for name in names),
        evictions=sum(counts.evictions[name] for name in names),
        hot_evictions=sum(counts.hot_evictions[name] for name in names),
        unserved=sum(request.begun is None for request in listed),
        waiting=waiting([request.waited for request in listed]),
    )


def waiting(secs: Sequence[float]) -> WaitFigures:
    """Nearest-rank percentiles."""
    if not secs:
        return WaitFigures()
    ordered = sorted(secs)
    p50, p95, p99 = (ordered[max(0, math.ceil(len(ordered) * share) - 1)] for share in (0.5, 0.95, 0.99))
    return WaitFigures(math.fsum(ordered) / len(ordered), p50, p95, p99, ordered[-1])
