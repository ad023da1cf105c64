"""The rate-limit headers of an answer: OpenAI's, or Anthropic's. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timezone

from cortex.accounts.limits.terms import RateState


def rate_headers(rates: RateState, now: float, *, anthropic: bool) -> dict[str, str]:
    """Names in lower case, and values; empty without a limit. `now`: seconds since 1970."""
    found: dict[str, str] = {}
    for kind, limit, remaining, reset in (
        ("requests", rates.requests_limit, rates.requests_remaining, rates.requests_reset),
        ("tokens", rates.tokens_limit, rates.tokens_remaining, rates.tokens_reset),
    ):
        if limit is None:
            continue
        if anthropic:
            prefix = f"anthropic-ratelimit-{kind}"
            found[f"{prefix}-limit"] = str(limit)
            found[f"{prefix}-remaining"] = str(remaining)
            found[f"{prefix}-reset"] = _timestamp(now + reset)
        else:
            found[f"x-ratelimit-limit-{kind}"] = str(limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            found[f"x-ratelimit-reset-{kind}"] = _duration(reset)
    return found


def rate_lines(rates: RateState, now: float, *, anthropic: bool) -> bytes:
    """The same as header lines, each after a CRLF: `b"\\r\\nx-ratelimit-limit-requests: 60…"`."""
    headers = rate_headers(rates, now, anthropic=anthropic)
    return "".join([f"\r\n{name}: {value}" for name, value in headers.items()]).encode()


def _timestamp(at: float) -> str:
    """RFC 3339, in whole seconds, rounded up."""
    return datetime.fromtimestamp(math.ceil(at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _duration(secs: float) -> str:
    """As OpenAI writes it: `0s`, `20ms`, `8.64s`, `6m0s`, `1h0m2.5s`. Rounded up to milliseconds."""
    millis = math.ceil(secs * 1000 - 1e-6)
    if millis <= 0:
        return "0s"
    if millis < 1000:
        return f"{millis}ms"
    minutes, millis = divmod(millis, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds, millis = divmod(millis, 1000)
    fraction = f".{millis:03}".rstrip("0") if millis else ""
    more = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{more}{seconds}{fraction}s"
