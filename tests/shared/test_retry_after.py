"""Retry-After: estimates and rounding."""

from __future__ import annotations

import pytest

from shared.errors import Unavailable
from shared.retry_after import UNKNOWN_LOAD_SECS, until_loaded, until_retry


@pytest.mark.parametrize(("given", "told"), [(-3, 1), (0, 1), (0.2, 1), (1, 1), (9.01, 10), (300, 300)])
def test_seconds_are_rounded_up(given: float, told: int) -> None:
    """A client that retries too early would be refused again; less than a second, or a time that has passed, is 1."""
    assert Unavailable("x", retry_after=given).retry_after == told


@pytest.mark.parametrize(
    ("remaining", "expected", "elapsed", "secs"),
    [(7.0, 60.0, 10.0, 7.0), (None, 60.0, 10.0, 50.0), (None, 60.0, 0.0, 60.0), (None, None, 10.0, UNKNOWN_LOAD_SECS)],
)
def test_the_best_estimate_of_a_load_counts(
    remaining: float | None, expected: float | None, elapsed: float, secs: float
) -> None:
    """The neuron's own estimate first, then the time of earlier loads, then a fixed delay."""
    assert until_loaded(remaining_secs=remaining, expected_secs=expected, elapsed_secs=elapsed) == secs


def test_a_failed_load_is_retried_when_its_backoff_ends() -> None:
    """The client waits as long as cortex does."""
    assert until_retry(107.5, 100.0) == 7.5
