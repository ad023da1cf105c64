"""The terms of limits: what is limited, what a request may use at most, and what is granted to it. Pure. Not
compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

from typing import Final

import msgspec

from cortex.accounts.prices import FREE, Prices


class Budget(msgspec.Struct, frozen=True):
    """At most `amount` within each `window`. `unit` is `"tokens"` or a currency such as `"EUR"`, as in the catalogue's
    prices. `window`: `"hour"`, `"day"`, `"week"` or `"month"` of the calendar in UTC, or seconds of a rolling one."""

    amount: float
    unit: str
    window: str | float


class Limits(msgspec.Struct, frozen=True):
    """What may be used; None for no limit. `rpm`, `tpm`: requests and tokens per minute, a bucket of one minute's that
    is refilled continuously. `parallel`: requests at a time."""

    rpm: int | None = None
    tpm: int | None = None
    parallel: int | None = None
    budgets: tuple[Budget, ...] = ()

    @property
    def unlimited(self) -> bool:
        return self.rpm is None and self.tpm is None and self.parallel is None and not self.budgets


NO_LIMITS: Final = Limits()


class KeyLimits(msgspec.Struct, frozen=True):
    """The limits of one API key. `total`: of all that it uses. `by_models`: glob of model ids to what the models that
    match it may use together; these hold beside `total`."""

    total: Limits = NO_LIMITS
    by_models: dict[str, Limits] = {}

    @property
    def unlimited(self) -> bool:
        return self.total.unlimited and all(limits.unlimited for limits in self.by_models.values())


WHOLE_CONTEXT: Final = 1 << 40
"""As the tokens of one prompt: as many as the model's context."""


class TokenBound(msgspec.Struct, frozen=True, gc=False):
    """The tokens that a request can use at most, as far as its body says.

    `prompt`: of all its prompts together. `output`: of one answer; None if the body does not say. `answers`: how many
    are made. `prompts`: how many prompts there are; only a single one is limited by the model's context.
    """

    prompt: int
    output: int | None = 0
    answers: int = 1
    prompts: int = 1


class RateState(msgspec.Struct, frozen=True, gc=False):
    """For the rate-limit headers of an answer: the tightest limit that held. None where there is no such limit. Resets
    are seconds until the whole limit is free again."""

    requests_limit: int | None = None
    requests_remaining: int = 0
    requests_reset: float = 0.0
    tokens_limit: int | None = None
    tokens_remaining: int = 0
    tokens_reset: float = 0.0


NO_RATES: Final = RateState()


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A request that its limits allow. It has to be settled once it has ended, by its `number`."""

    number: int
    rates: RateState


UNLIMITED: Final = Grant(0, NO_RATES)
"""For a request that no limit holds for. It need not be settled."""


class ModelTerms(msgspec.Struct, frozen=True, gc=False):
    """What a request for a model is measured with. `context`: tokens of prompt and answer together, `output`: of an
    answer whose request does not say; None if unknown."""

    limits: Limits = NO_LIMITS
    context: int | None = None
    output: int | None = None
    prices: Prices = FREE
