"""Admits requests within their limits, and settles them: for one cortex alone, in memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

from cortex.accounts.caller import Caller
from cortex.accounts.limits.admission import Consumption, HeldTokens, most_usage, reserve, scopes_of
from cortex.accounts.limits.exceeded import rate_state
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.terms import NO_RATES, Grant, KeyLimits, ModelTerms, TokenBound

UNLIMITED: Final = Grant(0, NO_RATES)
"""For a request that no limit holds for. It need not be settled."""

MAX_REMEMBERED: Final = 10_000
"""Pairs of key and model whose scopes are kept at hand."""


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
        """The request of this grant has ended and used so many tokens; `prompt` includes `cached`. Call it once for
        each grant."""


class LimitOwner(Limiter, Protocol):
    """A Limiter in the control, which owns what is left of the limits."""

    def use_keys(self, keys: Mapping[str, KeyLimits]) -> None:
        """The limits of the API keys from now on, by `key_id`; keys without limits may be left out."""

    def models_changed(self) -> None:
        """The limits of models may have changed."""

    def settle_at_bound(self, grant: Grant) -> None:
        """The request of this grant has ended; what it used is unknown, so all that it reserved counts."""


class LocalLimiter:
    """Implements LimitOwner for a cortex that shares its limits with no other."""

    def __init__(self, model_terms: ModelTermsTable, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970."""
        self._model_terms = model_terms
        self._clock = clock
        self._keys: Mapping[str, KeyLimits] = {}
        self._scopes: dict[str, Scope] = {}
        self._of_request: dict[tuple[str, str], list[Scope]] = {}  # by key and model
        self._running: dict[int, HeldTokens] = {}
        self._numbers = itertools.count(1)

    @property
    def limited_models(self) -> Collection[str]:
        return self._model_terms.limited

    def use_keys(self, keys: Mapping[str, KeyLimits]) -> None:
        self._keys = keys
        self._of_request.clear()

    def models_changed(self) -> None:
        self._of_request.clear()

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        now = self._clock()
        terms = self._model_terms(model_id)
        scopes = self._of_request.get((caller.key_id, model_id))
        if scopes is None:
            scopes = self._find_scopes(caller, model_id, terms, now)
        if not scopes:
            return UNLIMITED
        reservation = reserve(scopes, most_usage(bound, terms), terms.prices, now)
        number = next(self._numbers)
        self._running[number] = reservation
        return Grant(number, rate_state(scopes))

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        grant = self.admit(caller, model_id, bound)
        assert grant is not None
        return grant

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        reservation = self._running.pop(grant.number, None)
        if reservation is not None:
            used = Consumption(prompt + completion, reservation.prices.cost(prompt, completion, cached))
            reservation.settle(used, self._clock())

    def settle_at_bound(self, grant: Grant) -> None:
        reservation = self._running.pop(grant.number, None)
        if reservation is not None:
            reservation.settle(reservation.most, self._clock())

    def _find_scopes(self, caller: Caller, model_id: str, terms: ModelTerms, now: float) -> list[Scope]:
        found: list[Scope] = []
        key = self._keys.get(caller.key_id)
        for name, label, limits in scopes_of(caller.key_id, caller.name, key, model_id, terms.limits):
            scope = self._scopes.get(name)
            if scope is None:
                scope = self._scopes[name] = Scope(name, label, limits, now)
            else:
                scope.advance(now)
                scope.label = label
                scope.configure(limits)
            found.append(scope)
        if len(self._of_request) >= MAX_REMEMBERED:
            self._of_request.clear()
        self._of_request[caller.key_id, model_id] = found
        return found
