"""Formats simulations as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cortex.simulator.outcome import Figures, Outcome
from shared.tables import table

_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("requests", lambda f: str(f.requests)),
    ("cold starts", lambda f: str(f.cold_starts)),
    ("loads", lambda f: str(f.loads)),
    ("displacements", lambda f: str(f.displacements)),
    ("  of hot models", lambda f: str(f.hot_displacements)),
    ("unserved", lambda f: str(f.unserved)),
    ("waiting, mean", lambda f: f"{f.waiting.mean:.2f} s"),
    ("  p50", lambda f: f"{f.waiting.p50:.1f} s"),
    ("  p95", lambda f: f"{f.waiting.p95:.1f} s"),
    ("  p99", lambda f: f"{f.waiting.p99:.1f} s"),
    ("  max", lambda f: f"{f.waiting.max:.1f} s"),
)


def side_by_side(outcomes: Sequence[Outcome]) -> str:
    """One column per policy."""
    rows: list[list[str]] = [[label, *(show(each.total) for each in outcomes)] for label, show in _ROWS]
    rows.append(["VRAM loaded", *(f"{each.vram_loaded_pct:.1f} %" for each in outcomes)])
    rows.append(["VRAM in use", *(f"{each.vram_in_use_pct:.1f} %" for each in outcomes)])
    return table([["", *(each.policy for each in outcomes)], *rows])


def by_model(outcome: Outcome) -> str:
    """One line per requested model."""
    rows = [
        [
            model,
            each.requests,
            each.cold_starts,
            each.loads,
            each.displacements,
            each.unserved,
            f"{each.waiting.mean:.2f} s",
            f"{each.waiting.p99:.1f} s",
            f"{each.waiting.max:.1f} s",
        ]
        for model, each in sorted(outcome.by_model.items(), key=lambda item: (-item[1].requests, item[0]))
    ]
    head = ["REQUESTS", "COLD", "LOADS", "DISPLACED", "UNSERVED", "MEAN", "P99", "MAX"]
    return table([[outcome.policy.upper(), *head], *rows])
