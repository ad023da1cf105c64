"""The ratio of two policies' waits and its 95 % interval."""

from __future__ import annotations

import random

import pytest

from cortex.simulator.statistics import t_975, wait_ratio


def test_equal_waits_have_ratio_1_without_doubt() -> None:
    ratio = wait_ratio([3.0, 5.0], [3.0, 5.0])
    assert ratio is not None
    assert (ratio.value, ratio.interval) == (1.0, (1.0, 1.0))


def test_what_a_seed_does_to_both_does_not_widen_the_interval() -> None:
    ratio = wait_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert ratio is not None
    assert ratio.interval is not None
    assert (ratio.value, *ratio.interval) == pytest.approx((2, 2, 2))


def test_there_is_no_ratio_to_0_and_no_interval_of_one_seed() -> None:
    assert wait_ratio([1.0], [0.0]) is None
    ratio = wait_ratio([3.0], [2.0])
    assert ratio is not None
    assert (ratio.value, ratio.interval) == (1.5, None)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (9, 2.262), (11, 2.201), (19, 2.093), (100, 1.984)])
def test_percentiles_of_student_s_t(freedom: int, expected: float) -> None:
    assert t_975(freedom) == pytest.approx(expected, abs=0.001)


def test_about_95_of_100_intervals_contain_the_ratio() -> None:
    """Ten seeds each, whose waits differ a lot; both policies feel the seed."""
    chance = random.Random(1)
    contained = 0
    for _ in range(400):
        base = [chance.lognormvariate(1, 0.4) for _ in range(10)]
        ratio = wait_ratio([1.1 * each * chance.lognormvariate(-0.02, 0.2) for each in base], base)
        assert ratio is not None
        assert ratio.interval is not None
        contained += ratio.interval[0] <= 1.1 <= ratio.interval[1]
    assert 0.90 < contained / 400 < 0.98
