"""The rate-limit headers of an answer: OpenAI's, or Anthropic's. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Final

from cortex.accounts.limits.terms import RateState

_OPENAI: Final = b"\r\nx-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b"
_ANTHROPIC: Final = (
    b"\r\nanthropic-ratelimit-%b-limit: %%d\r\nanthropic-ratelimit-%b-remaining: %%d"
    b"\r\nanthropic-ratelimit-%b-reset: %%b"
)
_OPENAI_REQUESTS: Final = _OPENAI % (b"requests", b"requests", b"requests")
_OPENAI_TOKENS: Final = _OPENAI % (b"tokens", b"tokens", b"tokens")
_ANTHROPIC_REQUESTS: Final = _ANTHROPIC % (b"requests", b"requests", b"requests")
_ANTHROPIC_TOKENS: Final = _ANTHROPIC % (b"tokens", b"tokens", b"tokens")


def rate_lines(rates: RateState, now: float, *, anthropic: bool) -> bytes:
    """The headers as lines, each after a CRLF: `b"\\r\\nx-ratelimit-limit-requests: 60…"`; empty without a limit.
    `now`: seconds since 1970."""
    lines = b""
    requests, tokens = rates.requests_limit, rates.tokens_limit
    if requests is not None:
        lines = (_ANTHROPIC_REQUESTS if anthropic else _OPENAI_REQUESTS) % (
            requests,
            rates.requests_remaining,
            _timestamp(now + rates.requests_reset) if anthropic else _duration(rates.requests_reset),
        )
    if tokens is not None:
        lines += (_ANTHROPIC_TOKENS if anthropic else _OPENAI_TOKENS) % (
            tokens,
            rates.tokens_remaining,
            _timestamp(now + rates.tokens_reset) if anthropic else _duration(rates.tokens_reset),
        )
    return lines


def rate_headers(rates: RateState, now: float, *, anthropic: bool) -> dict[str, str]:
    """The same by their names, in lower case."""
    lines = rate_lines(rates, now, anthropic=anthropic).decode().split("\r\n")
    return dict(line.split(": ") for line in lines if line)


def _timestamp(at: float) -> bytes:
    """RFC 3339, in whole seconds, rounded up."""
    return datetime.fromtimestamp(math.ceil(at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


def _duration(secs: float) -> bytes:
    """As OpenAI writes it: `0s`, `20ms`, `8.64s`, `6m0s`, `1h0m2.5s`. Rounded up to milliseconds."""
    millis = math.ceil(secs * 1000 - 1e-6)
    if millis < 1000:
        return b"%dms" % millis if millis > 0 else b"0s"
    minutes, millis = divmod(millis, 60_000)
    seconds, millis = divmod(millis, 1000)
    written = b"%d.%03d" % (seconds, millis) if millis else b"%d" % seconds
    if millis:
        written = written.rstrip(b"0")
    if minutes == 0:
        return written + b"s"
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%bs" % (hours, minutes, written) if hours else b"%dm%bs" % (minutes, written)
