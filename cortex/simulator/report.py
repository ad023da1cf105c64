"""Formats simulations as tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from cortex.simulator.comparison import Comparison
from cortex.simulator.outcome import Figures, Outcome, WaitFigures
from cortex.simulator.statistics import wait_ratio
from shared.terminal.tables import table

_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("requests", lambda f: str(f.requests)),
    ("cold starts", lambda f: str(f.cold_starts)),
    ("loads", lambda f: str(f.loads)),
    ("evictions", lambda f: str(f.evictions)),
    ("  of hot models", lambda f: str(f.hot_evictions)),
    ("unserved", lambda f: str(f.unserved)),
    ("waiting, mean", lambda f: f"{f.waiting.mean:.2f} s"),
    ("  p50", lambda f: f"{f.waiting.p50:.1f} s"),
    ("  p95", lambda f: f"{f.waiting.p95:.1f} s"),
    ("  p99", lambda f: f"{f.waiting.p99:.1f} s"),
    ("  max", lambda f: f"{f.waiting.max:.1f} s"),
)

_COUNTS: tuple[Callable[[Figures], float], ...] = (
    lambda f: f.cold_starts,
    lambda f: f.loads,
    lambda f: f.unserved,
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
            each.evictions,
            each.unserved,
            f"{each.waiting.mean:.2f} s",
            f"{each.waiting.p99:.1f} s",
            f"{each.waiting.max:.1f} s",
        ]
        for model, each in sorted(outcome.by_model.items(), key=lambda item: (-item[1].requests, item[0]))
    ]
    head = ["REQUESTS", "COLD", "LOADS", "EVICTED", "UNSERVED", "MEAN", "P99", "MAX"]
    return table([[outcome.policy.upper(), *head], *rows])


def by_key(outcomes: Sequence[Outcome]) -> str:
    """One line per API key: how many requests it sent, and the mean and 99th percentile of its wait by policy."""
    head = [text for each in outcomes for text in (f"{each.policy.upper()} MEAN", "P99")]
    rows = [
        [key, *(text for each in outcomes for text in _key_waits(each.waiting_by_key[key]))]
        for key in outcomes[0].waiting_by_key
    ]
    return table([["KEY", *head], *rows])


def _key_waits(waits: WaitFigures) -> tuple[str, str]:
    return f"{waits.mean:.2f} s", f"{waits.p99:.1f} s"


def comparison(compared: Comparison) -> str:
    """One line per load and policy: means over the seeds, the ratio of the waits to the planner's with its 95 %
    interval (above 1 the planner is better), and in how many seeds the planner's wait was shorter."""
    head = [
        "LOAD",
        "POLICY",
        "COLD",
        "LOADS",
        "UNSERVED",
        "MEAN",
        "P99",
        "MEAN/PLANNER",
        "P99/PLANNER",
        "PLANNER BETTER",
    ]
    rows: list[list[object]] = [list(head)]
    for load, policies in compared.outcomes.items():
        waits = compared.waits(load)
        ours = waits["planner"]
        for name, theirs in waits.items():
            outcomes, is_planner = policies.get(name), theirs is ours
            rows.append(
                [
                    f"{load:g}",
                    name,
                    *("" if outcomes is None else f"{average(outcomes, count):.0f}" for count in _COUNTS),
                    f"{statistics.fmean(each.mean for each in theirs):.2f} s",
                    f"{statistics.fmean(each.p99 for each in theirs):.1f} s",
                    "" if is_planner else _ratio_with_interval(theirs, ours, _mean),
                    "" if is_planner else _ratio_with_interval(theirs, ours, _p99),
                    "" if is_planner else f"mean {_better(ours, theirs, _mean)}, p99 {_better(ours, theirs, _p99)}",
                ]
            )
    return table(rows, right={2, 3, 4, 5, 6})


def _ratio_with_interval(
    waits: Sequence[WaitFigures], base: Sequence[WaitFigures], figure: Callable[[WaitFigures], float]
) -> str:
    """Such as `1.04 (0.98 to 1.10)`; "-" when the base is 0."""
    ratio = wait_ratio([figure(each) for each in waits], [figure(each) for each in base])
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f}" + (f" ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})" if ratio.interval else "")


def average(outcomes: Sequence[Outcome], figure: Callable[[Figures], float]) -> float:
    """The mean of a figure over the seeds."""
    return statistics.fmean(figure(each.total) for each in outcomes)


def _mean(waits: WaitFigures) -> float:
    return waits.mean


def _p99(waits: WaitFigures) -> float:
    return waits.p99


def _better(ours: Sequence[WaitFigures], theirs: Sequence[WaitFigures], figure: Callable[[WaitFigures], float]) -> str:
    """In how many seeds ours is smaller, as `7 of 10`."""
    better = sum(figure(one) < figure(other) for one, other in zip(ours, theirs, strict=True))
    return f"{better} of {len(ours)}"
