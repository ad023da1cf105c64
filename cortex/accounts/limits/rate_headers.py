"""The rate-limit headers of an answer: OpenAI's, or Anthropic's. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Final

from msgspec.structs import astuple

from cortex.accounts.limits.terms import RateState

# What is the same in most answers is formatted once: formatting was a twentieth of a request with limits.
_MILLIS: Final = [b"%dms" % number for number in range(1000)]
_REQUESTS: Final[dict[int, bytes]] = {}  # by limit
_TOKENS: Final[dict[int, bytes]] = {}
_MAX_STARTS: Final = 1000
_REQUESTS_RESET: Final = b"\r\nx-ratelimit-reset-requests: "
_TOKENS_RESET: Final = b"\r\nx-ratelimit-reset-tokens: "


def rate_lines(rates: RateState, now: float, *, anthropic: bool) -> bytes:
    """The headers as lines, each after a CRLF: `b"\\r\\nx-ratelimit-limit-requests: 60…"`; empty without a limit.
    `now`: seconds since 1970; only Anthropic's headers need it."""
    every: tuple[int | None, int, float, int | None, int, float] = astuple(rates)
    requests, requests_left, requests_reset, tokens, tokens_left, tokens_reset = every
    lines = b""
    if anthropic:
        if requests is not None:
            lines = _anthropic_lines("requests", requests, requests_left, now + requests_reset)
        if tokens is not None:
            lines += _anthropic_lines("tokens", tokens, tokens_left, now + tokens_reset)
    else:
        if requests is not None:
            start = _REQUESTS.get(requests) or _start(_REQUESTS, "requests", requests)
            lines = start + str(requests_left).encode() + _REQUESTS_RESET + _duration(requests_reset)
        if tokens is not None:
            start = _TOKENS.get(tokens) or _start(_TOKENS, "tokens", tokens)
            lines = lines + start + str(tokens_left).encode() + _TOKENS_RESET + _duration(tokens_reset)
    return lines


def rate_headers(rates: RateState, now: float, *, anthropic: bool) -> dict[str, str]:
    """The same by their names, in lower case."""
    lines = rate_lines(rates, now, anthropic=anthropic).decode().split("\r\n")
    return dict(line.split(": ") for line in lines if line)


def _start(starts: dict[int, bytes], kind: str, limit: int) -> bytes:
    """The lines of a limit up to what remains of it."""
    if len(starts) >= _MAX_STARTS:
        starts.clear()
    start = f"\r\nx-ratelimit-limit-{kind}: {limit}\r\nx-ratelimit-remaining-{kind}: ".encode()
    starts[limit] = start
    return start


def _anthropic_lines(kind: str, limit: int, remaining: int, full_at: float) -> bytes:
    lines = (
        f"\r\nanthropic-ratelimit-{kind}-limit: {limit}\r\nanthropic-ratelimit-{kind}-remaining: {remaining}"
        f"\r\nanthropic-ratelimit-{kind}-reset: {_timestamp(full_at)}"
    )
    return lines.encode()


def _timestamp(at: float) -> str:
    """RFC 3339, in whole seconds, rounded up."""
    return datetime.fromtimestamp(math.ceil(at), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _duration(secs: float) -> bytes:
    """As OpenAI writes it: `0s`, `20ms`, `8.64s`, `6m0s`, `1h0m2.5s`. Rounded up to milliseconds."""
    exact = secs * 1000 - 1e-6
    if exact <= 0.0:
        return b"0s"
    millis = int(exact)
    if millis < exact:
        millis += 1
    if millis < 1000:
        return _MILLIS[millis]
    minutes, millis = divmod(millis, 60_000)
    seconds, millis = divmod(millis, 1000)
    written = str(seconds)
    if millis:
        written += "." + str(1000 + millis)[1:].rstrip("0")
    if minutes == 0:
        return (written + "s").encode()
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h{minutes}m{written}s" if hours else f"{minutes}m{written}s").encode()
