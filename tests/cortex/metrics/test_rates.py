"""The rates of models."""

from __future__ import annotations

from cortex.metrics.rates import WINDOW_SECS, ModelRate, Rates
from cortex.metrics.request_tally import RequestTally


def test_rates_of_the_last_seconds() -> None:
    counts, rates = RequestTally(), Rates()
    assert rates.rates(0.0) == {}
    rates.look([counts.collect()], 100.0)
    assert rates.rates(100.0) == {}
    counts.request("m", "a", 200, 1.0, 0.2)
    counts.request("m", "b", 503, 1.0, 0.4)
    counts.tokens("m", "a", 100, 50, 0)
    rates.look([counts.collect()], 105.0)
    assert rates.rates(105.0) == {"m": ModelRate(0.4, 0.2, 20.0, 10.0, 0.3)}
    rates.look([counts.collect()], 105.0 + WINDOW_SECS)
    rates.look([counts.collect()], 106.0 + WINDOW_SECS)
    assert rates.rates(106.0 + WINDOW_SECS) == {}


def test_a_look_after_hours_is_a_first_look() -> None:
    """The first dashboard that is opened after hours shows what happens now, not the mean of the hours."""
    counts, rates = RequestTally(), Rates()
    rates.look([counts.collect()], 1.0)
    for _ in range(7200):
        counts.request("m", "a", 200, 1.0, 0.2)
    rates.look([counts.collect()], 7201.0)
    assert rates.rates(7201.0) == {}
    counts.request("m", "a", 200, 1.0, 0.2)
    rates.look([counts.collect()], 7202.0)
    assert rates.rates(7202.0)["m"].requests_per_sec == 1.0
    assert rates.rates(7203.0 + WINDOW_SECS) == {}


def test_a_worker_that_has_exited_makes_no_negative_rate() -> None:
    counts, rates = RequestTally(), Rates()
    counts.request("m", "a", 200, 1.0, 0.2)
    rates.look([counts.collect(), counts.collect()], 1.0)
    rates.look([counts.collect()], 2.0)
    assert rates.rates(2.0) == {}
