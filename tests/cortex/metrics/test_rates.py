"""The rates of models."""

from __future__ import annotations

from cortex.metrics.counters import Counters
from cortex.metrics.rates import WINDOW_SECS, ModelRate, Rates


def test_rates_of_the_last_seconds() -> None:
    counters, rates = Counters(), Rates()
    assert rates.rates() == {}
    rates.look([counters], 100.0)
    assert rates.rates() == {}
    counters.request("m", "a", 200, 1.0, 0.2)
    counters.request("m", "b", 503, 1.0, 0.4)
    counters.tokens("m", "a", 100, 50, 0)
    rates.look([counters], 105.0)
    assert rates.rates() == {"m": ModelRate(0.4, 0.2, 20.0, 10.0, 0.3)}
    rates.look([counters], 105.0 + WINDOW_SECS)
    rates.look([counters], 106.0 + WINDOW_SECS)
    assert rates.rates() == {}


def test_a_worker_that_has_exited_makes_no_negative_rate() -> None:
    counters, rates = Counters(), Rates()
    counters.request("m", "a", 200, 1.0, 0.2)
    rates.look([counters, counters], 1.0)
    rates.look([counters], 2.0)
    assert rates.rates() == {}
