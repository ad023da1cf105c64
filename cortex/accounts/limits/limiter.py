"""Admits requests within their limits, and settles them: the contract."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from cortex.accounts.caller import Caller
from cortex.accounts.limits.terms import Grant, KeyLimits, TokenBound


class Limiter(Protocol):
    """Admits requests within the limits of their callers and models, and settles them. For all workers and, with a
    shared database, all cortexes together."""

    @property
    def limited_models(self) -> Collection[str]:
        """The ids of models that limit the requests of all callers together. A request for any other model by a caller
        that is not `limited` needs no grant."""

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        """Admits a request of this caller for this model (an id of the catalogue), and counts it until `settle`. None
        if that cannot be decided at once: ask `admission`.

        Raises:
            LimitExceeded: a limit of the caller or of the model refuses it.
        """

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        """As `admit`, where that has returned None. A cancelled call grants nothing.

        Raises:
            ServiceError: a limit refuses it (LimitExceeded), or the limits cannot be checked now.
        """

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        """The request of this grant has ended and used so many tokens; `prompt` includes `cached`. Call this or
        `settle_estimate` once for each grant."""

    def settle_estimate(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        """As `settle`, with tokens that are an estimate from above: no more than was reserved counts."""


class LimitOwner(Limiter, Protocol):
    """A Limiter in the control, which owns what is left of the limits."""

    def use_keys(self, keys: Mapping[str, KeyLimits]) -> None:
        """The limits of the API keys from now on, by `key_id`; keys without limits may be left out."""

    async def run(self) -> None:
        """Does what has to be done all the time. Never returns."""

    async def close(self) -> None:
        """Keeps what is left of the limits, after all requests have ended."""

    def models_changed(self) -> None:
        """The limits of models may have changed."""

    def settle_at_bound(self, grant: Grant) -> None:
        """The request of this grant has ended; what it used is unknown, so all that it reserved counts."""
