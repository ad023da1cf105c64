"""Classes of durations, which can be added up over days, for percentiles. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

CLASSES: Final = 32
UPPER_SECS: Final = tuple(0.01 * 2 ** (number / 2) for number in range(CLASSES - 1))
"""The longest duration of each class but the last, which has no end: 10 ms to 5 minutes."""
_LAST_SECS: Final = UPPER_SECS[-1] * 2


def class_of(secs: float) -> int:
    """The number of the class of a duration."""
    return bisect_left(UPPER_SECS, secs)


def percentile(counts: Sequence[int], percent: int) -> float | None:
    """The duration that so many percent do not exceed, from the number of durations in each class; None without any.
    It is interpolated within its class, so at most 42 % above the true one and 30 % below, usually within 10 %."""
    rank = sum(counts) * percent / 100
    below = 0
    for number, count in enumerate(counts):
        if count and below + count >= rank:
            start = UPPER_SECS[number - 1] if number else 0.0
            end = UPPER_SECS[number] if number < len(UPPER_SECS) else _LAST_SECS
            return start + (end - start) * (rank - below) / count
        below += count
    return None
