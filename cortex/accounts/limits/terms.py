"""The terms of limits: what is limited, what a request may use at most, and what is granted to it. Pure. Not
compiled: mypyc does not know msgspec's structs."""

from __future__ import annotations

import msgspec


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


class TokenBound(msgspec.Struct, frozen=True, gc=False):
    """The tokens that a request can use at most."""

    prompt: int
    output: int


class RateState(msgspec.Struct, frozen=True, gc=False):
    """For the rate-limit headers of an answer: the tightest limit that held. None where there is no such limit. Resets
    are seconds until the whole limit is free again."""

    requests_limit: int | None = None
    requests_remaining: int = 0
    requests_reset: float = 0.0
    tokens_limit: int | None = None
    tokens_remaining: int = 0
    tokens_reset: float = 0.0


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A request that its limits allow. It has to be settled once it has ended, by its `number`."""

    number: int
    rates: RateState
