"""The error of a request that a limit refuses, and what the headers of an answer say of the limits. Pure."""

from __future__ import annotations

from cortex.accounts.limits.scope import Refusal, Scope
from cortex.accounts.limits.terms import NO_RATES, RateState
from shared.errors import TooManyRequests
from shared.protocol import ErrorCode
from shared.retry_after import LONGEST_CLIENT_WAIT_SECS, RUNNING_REQUEST_SECS, whole_seconds


class LimitExceeded(TooManyRequests):
    """429: a limit of the key or of the model refuses the request. `rates` are for the headers."""

    rates: RateState = NO_RATES


def limit_exceeded(refusal: Refusal, rates: RateState, *, made_of: str, advice: str) -> LimitExceeded:
    """What the client of a refused request gets. `made_of`: what the tokens of the request are. `advice`: how it gets
    within a budget that is too small for it."""
    code = ErrorCode.RATE_LIMIT_EXCEEDED if refusal.window is None else ErrorCode.INSUFFICIENT_QUOTA
    wait = refusal.wait_secs
    if refusal.runs:
        wait = max(RUNNING_REQUEST_SECS, wait or 0.0)
    error = LimitExceeded(
        f"{refusal.scope.label} {_reason(refusal, wait, made_of, advice)}",
        code=code,
        retry_after=wait,
        permanent=wait is None or whole_seconds(wait) > LONGEST_CLIENT_WAIT_SECS,
    )
    error.rates = rates
    return error


def _reason(refusal: Refusal, wait: float | None, made_of: str, advice: str) -> str:
    most, window = f"may use up to {refusal.needs} ({made_of})", refusal.window
    if wait is None and (window is None or not window.amount):
        return f"may send no request ({'limit' if window is None else 'budget'}: {refusal.limit})"
    if wait is None:
        return f"cannot send this request: it {most}, more than the whole budget of {refusal.limit}; {advice}"
    text = f"has reached its limit of {refusal.limit}"
    if window is not None:
        text = f"does not have enough left of its budget of {refusal.limit}"
    return f"{text}{f': this request {most}' if refusal.needs else ''}; {_when(refusal, wait)}"


def _when(refusal: Refusal, wait: float) -> str:
    secs = whole_seconds(wait)
    return f"retry once a running request has ended, not before {secs} s" if refusal.runs else f"retry in {secs} s"


def rate_state(scopes: list[Scope]) -> RateState:
    """Of the scopes of a request, for each kind of limit the one that has least left."""
    requests: Scope | None = None
    tokens: Scope | None = None
    for scope in scopes:
        if scope.rpm >= 0.0 and (requests is None or scope.requests < requests.requests):
            requests = scope
        if scope.tpm >= 0.0 and (tokens is None or scope.tokens_free < tokens.tokens_free):
            tokens = scope
    if requests is None and tokens is None:
        return NO_RATES
    requests_limit: int | None = None
    tokens_limit: int | None = None
    requests_left = tokens_left = 0
    requests_reset = tokens_reset = 0.0
    if requests is not None:
        requests_limit, requests_reset = int(requests.rpm), requests.requests_full_in
        requests_left = max(0, int(requests.requests))
    if tokens is not None:
        tokens_limit, tokens_reset = int(tokens.tpm), tokens.tokens_full_in
        tokens_left = max(0, int(tokens.tokens_free))
    return RateState(requests_limit, requests_left, requests_reset, tokens_limit, tokens_left, tokens_reset)
