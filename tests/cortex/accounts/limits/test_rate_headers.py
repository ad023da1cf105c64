"""The rate-limit headers are those that OpenAI's and Anthropic's clients read."""

from __future__ import annotations

import pytest

from cortex.accounts.limits.rate_headers import rate_headers, rate_lines
from cortex.accounts.limits.terms import NO_RATES, RateState

RATES = RateState(60, 59, 1.0, 150_000, 149_984, 0.0064)


def test_openai() -> None:
    assert rate_headers(RATES, 0, anthropic=False) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "149984",
        "x-ratelimit-reset-tokens": "7ms",
    }


def test_anthropic() -> None:
    assert rate_headers(RATES, 1_800_000_000.5, anthropic=True) == {
        "anthropic-ratelimit-requests-limit": "60",
        "anthropic-ratelimit-requests-remaining": "59",
        "anthropic-ratelimit-requests-reset": "2027-01-15T08:00:02Z",
        "anthropic-ratelimit-tokens-limit": "150000",
        "anthropic-ratelimit-tokens-remaining": "149984",
        "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:01Z",
    }


def test_only_limits_that_exist_are_told() -> None:
    lines = rate_lines(RateState(5, 0, 60.0), 0, anthropic=False)
    assert lines == (
        b"\r\nx-ratelimit-limit-requests: 5\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 1m0s"
    )
    assert rate_lines(NO_RATES, 0, anthropic=True) == b""


@pytest.mark.parametrize(
    ("secs", "written"),
    [(0, "0s"), (0.0001, "1ms"), (8.64, "8.64s"), (59.9999, "1m0s"), (360, "6m0s"), (3602.5, "1h0m2.5s")],
)
def test_durations_are_written_as_openai_does(secs: float, written: str) -> None:
    assert rate_headers(RateState(1, 0, secs), 0, anthropic=False)["x-ratelimit-reset-requests"] == written
