"""The error of a request that a limit refuses, and what the headers of an answer say of the limits. Pure."""

from __future__ import annotations

from cortex.accounts.limits.scope import Refusal, Scope
from cortex.accounts.limits.terms import NO_RATES, RateState
from shared.errors import TooManyRequests
from shared.protocol import ErrorCode
from shared.retry_after import RUNNING_REQUEST_SECS, whole_seconds


class LimitExceeded(TooManyRequests):
    """429: a limit of the key or of the model refuses the request. `rates` are for the headers."""

    rates: RateState = NO_RATES


def limit_exceeded(refusal: Refusal, rates: RateState) -> LimitExceeded:
    """What the client of a refused request gets."""
    code = ErrorCode.INSUFFICIENT_QUOTA if refusal.budget else ErrorCode.RATE_LIMIT_EXCEEDED
    wait = refusal.wait_secs
    if refusal.runs:
        wait = max(RUNNING_REQUEST_SECS, wait or 0.0)
    error = LimitExceeded(
        f"{refusal.scope.label} {_reason(refusal, wait)}",
        code=code,
        retry_after=wait,
        permanent=wait is None,
    )
    error.rates = rates
    return error


def _reason(refusal: Refusal, wait: float | None) -> str:
    needs = f": this request may use up to {refusal.needs}" if refusal.needs else ""
    if not refusal.budget:
        reached = f"has reached its limit of {refusal.limit}{needs}"
        return (
            f"{reached}; {_when(refusal, wait)}"
            if wait is not None
            else f"may send no request (limit: {refusal.limit})"
        )
    if wait is None:
        return (
            f"cannot send this request: it may use up to {refusal.needs}, more than the whole budget of "
            f"{refusal.limit}; lower max_tokens or shorten the prompt"
        )
    return f"has not enough left of its budget of {refusal.limit}{needs}; {_when(refusal, wait)}"


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
