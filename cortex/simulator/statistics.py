"""How much longer one policy waits than another, with a 95 % confidence interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided 95 % interval, with 1 to 10 degrees of freedom."""
_Z_975 = 1.959964


@dataclass(frozen=True)
class WaitRatio:
    """The ratio of two means over the same seeds. `interval` is (low, high), None for a single seed."""

    value: float
    interval: tuple[float, float] | None


def wait_ratio(waits: Sequence[float], base: Sequence[float]) -> WaitRatio | None:
    """The mean of `waits` divided by that of `base`, where both have one figure a seed; None when the base is 0.

    The interval is that of a ratio estimator: by the delta method, with Student's t. It compares the two seed by seed,
    so that what a seed does to both does not widen it.
    """
    count, below = len(base), math.fsum(base) / len(base)
    if not below:
        return None
    value = math.fsum(waits) / count / below
    if count == 1:
        return WaitRatio(value, None)
    squares = math.fsum((wait - value * other) ** 2 for wait, other in zip(waits, base, strict=True))
    reach = t_975(count - 1) * math.sqrt(squares / (count - 1) / count) / below
    return WaitRatio(value, (value - reach, value + reach))


def t_975(freedom: int) -> float:
    """The 97.5th percentile of Student's t, to three digits."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = _Z_975
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + math.fsum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
