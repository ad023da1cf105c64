"""The rate-limit headers of an answer: OpenAI's, or Anthropic's. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timezone

from cortex.accounts.limits.terms import RateState


def rate_lines(rates: RateState, now: float, *, anthropic: bool) -> bytes:
    """The headers as lines, each after a CRLF: `b"\\r\\nx-ratelimit-limit-requests: 60…"`; empty without a limit.
    `now`: seconds since 1970."""
    lines = ""
    requests, tokens = rates.requests_limit, rates.tokens_limit
    if requests is not None:
        left, reset = rates.requests_remaining, rates.requests_reset
        if anthropic:
            lines = _anthropic_lines("requests", requests, left, now + reset)
        else:
            lines = _openai_lines("requests", requests, left, reset)
    if tokens is not None:
        left, reset = rates.tokens_remaining, rates.tokens_reset
        if anthropic:
            lines += _anthropic_lines("tokens", tokens, left, now + reset)
        else:
            lines += _openai_lines("tokens", tokens, left, reset)
    return lines.encode()


def rate_headers(rates: RateState, now: float, *, anthropic: bool) -> dict[str, str]:
    """The same by their names, in lower case."""
    lines = rate_lines(rates, now, anthropic=anthropic).decode().split("\r\n")
    return dict(line.split(": ") for line in lines if line)


def _openai_lines(kind: str, limit: int, remaining: int, reset: float) -> str:
    return (
        f"\r\nx-ratelimit-limit-{kind}: {limit}\r\nx-ratelimit-remaining-{kind}: {remaining}"
        f"\r\nx-ratelimit-reset-{kind}: {_duration(reset)}"
    )


def _anthropic_lines(kind: str, limit: int, remaining: int, full_at: float) -> str:
    return (
        f"\r\nanthropic-ratelimit-{kind}-limit: {limit}\r\nanthropic-ratelimit-{kind}-remaining: {remaining}"
        f"\r\nanthropic-ratelimit-{kind}-reset: {_timestamp(full_at)}"
    )


def _timestamp(at: float) -> str:
    """RFC 3339, in whole seconds, rounded up."""
    return datetime.fromtimestamp(math.ceil(at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _duration(secs: float) -> str:
    """As OpenAI writes it: `0s`, `20ms`, `8.64s`, `6m0s`, `1h0m2.5s`. Rounded up to milliseconds."""
    millis = math.ceil(secs * 1000 - 1e-6)
    if millis <= 0:
        return "0s"
    if millis < 1000:
        return str(millis) + "ms"
    minutes, millis = divmod(millis, 60_000)
    seconds, millis = divmod(millis, 1000)
    written = str(seconds)
    if millis:
        written += "." + str(1000 + millis)[1:].rstrip("0")
    if minutes == 0:
        return written + "s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{written}s" if hours else f"{minutes}m{written}s"
