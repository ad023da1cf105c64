"""Which limits hold for a request, what it may use at most, and whether they admit it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from cortex.accounts.limits.exceeded import limit_exceeded, rate_state
from cortex.accounts.limits.scope import Refusal, Reserved, Scope
from cortex.accounts.limits.terms import KeyLimits, Limits, ModelTerms, TokenBound
from cortex.accounts.prices import Prices

UNKNOWN_CONTEXT: Final = 131072
"""Tokens of context of a model of which nothing is known."""


class ScopeTerms(NamedTuple):
    """One scope of a request. `label` is for people."""

    name: str
    label: str
    limits: Limits


def scopes_of(key_id: str, key_name: str, key: KeyLimits | None, model_id: str, model: Limits) -> list[ScopeTerms]:
    """The scopes whose limits hold for a request of this key (None: without limits) for this model."""
    found: list[ScopeTerms] = []
    if key is not None:
        if not key.total.unlimited:
            found.append(ScopeTerms(f"key:{key_id}", f"API key {key_name!r}", key.total))
        for glob, limits in key.by_models.items():
            if not limits.unlimited and fnmatchcase(model_id, glob):
                label = f"API key {key_name!r}, for models {glob!r},"
                found.append(ScopeTerms(f"key:{key_id}/{glob}", label, limits))
    if not model.unlimited:
        found.append(ScopeTerms(f"model:{model_id}", f"model {model_id!r}, for all API keys together,", model))
    return found


class Consumption(NamedTuple):
    """What a request uses, or may use at most."""

    tokens: int
    cost: float


def most_usage(bound: TokenBound, terms: ModelTerms) -> Consumption:
    """What a request may use at most."""
    context = terms.context or UNKNOWN_CONTEXT
    prompt = min(bound.prompt, context) if bound.prompts == 1 else bound.prompt
    output = bound.output
    if output is None:
        output = terms.output or context
    output = min(output, context) * bound.answers
    tokens = prompt + output
    if output and bound.prompts == 1:
        tokens = min(tokens, max(context * bound.answers, prompt))
    return Consumption(tokens, terms.prices.cost(prompt, output))


class HeldTokens(NamedTuple):
    """What one admitted request has reserved: of each scope so much of the token bucket and of the budgets."""

    scopes: list[tuple[Scope, float, Reserved]]
    most: Consumption
    prices: Prices

    def settle(self, used: Consumption, now: float) -> None:
        """The request has ended and used this."""
        for scope, held, budgets in self.scopes:
            scope.settle(held, budgets, used.tokens, used.cost, now)


def check(scopes: Sequence[Scope], most: Consumption, now: float) -> None:
    """Whether all scopes admit a request that may use `most`.

    Raises:
        LimitExceeded: a scope refuses it.
    """
    tokens, cost = most
    worst: Refusal | None = None
    for scope in scopes:
        scope.advance(now)
        refusal = scope.refusal(tokens, cost)
        if refusal is not None and (worst is None or _is_worse(refusal, worst)):
            worst = refusal
    if worst is not None:
        raise limit_exceeded(worst, rate_state(scopes))


def reserve(scopes: Sequence[Scope], most: Consumption, prices: Prices) -> HeldTokens:
    """Counts a request that all scopes admit."""
    tokens, cost = most
    return HeldTokens([(scope, *scope.reserve(tokens, cost)) for scope in scopes], most, prices)


def _is_worse(refusal: Refusal, other: Refusal) -> bool:
    """Whether it takes longer."""
    if other.wait_secs is None:
        return False
    return refusal.wait_secs is None or refusal.wait_secs > other.wait_secs
