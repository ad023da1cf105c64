"""The limits of a cortex that shares them with no other: in memory, written to its database each second.

After a crash nothing is forgotten: what may have been used since the last write counts as used. For buckets that is all
that was left; of budgets only as much may be used between two writes as the last one allowed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cortex.accounts.caller import Caller
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.limits.admission import Consumption, HeldTokens, check, most_usage, reserve, scopes_of
from cortex.accounts.limits.exceeded import rate_state
from cortex.accounts.limits.kept_state import PendingWrite, restore, write_before_use
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.scope_state import dump_scope
from cortex.accounts.limits.terms import NO_RATES, UNLIMITED, Grant, KeyLimits, ModelTerms, TokenBound

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.limit_states import LimitStates

log = logging.getLogger(__name__)

WRITE_SECS: Final = 1.0
NOTHING: Final = Consumption(0, 0.0)

MAX_REMEMBERED: Final = 10_000
"""Pairs of key and model whose scopes are kept at hand."""


class LocalLimiter:
    """Implements LimitOwner for a cortex that shares its limits with no other."""

    def __init__(
        self,
        model_terms: ModelTermsTable,
        states: LimitStates | None = None,
        *,
        kept: Mapping[str, dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`states`: where what is left is written, None for nowhere; `kept`: what was there at the start. `clock`:
        seconds since 1970."""
        self._model_terms = model_terms
        self._states = states
        self._kept = dict(kept or {})
        self._clock = clock
        self._writing = asyncio.Lock()
        self._failed = False  # the last write
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
        most = most_usage(bound, terms)
        check(scopes, most, now)
        for scope in scopes:
            if not scope.is_allowed_unwritten(most.tokens, most.cost):
                return None
        reservation = reserve(scopes, most, terms.prices)
        number = next(self._numbers)
        self._running[number] = reservation
        return Grant(number, rate_state(scopes))

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        async with self._writing:
            while (grant := self.admit(caller, model_id, bound)) is None:
                most = most_usage(bound, self._model_terms(model_id))
                await self._write(self._of_request[caller.key_id, model_id], most)
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

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECS)
            changed = [scope for scope in self._scopes.values() if scope.changed and scope.windows]
            if changed and self._states is not None:
                async with self._writing:
                    await self._write(changed, NOTHING)

    async def close(self) -> None:
        for number in list(self._running):
            self.settle_at_bound(Grant(number, NO_RATES))
        if self._states is not None and self._scopes:
            states = {scope.name: {**dump_scope(scope), "clean": True} for scope in self._scopes.values()}
            try:
                await self._states.write(states, self._clock())
            except DatabaseError as error:
                log.error("what is left of limits is not kept: %s", error)  # noqa: TRY400 - the message says all

    async def _write(self, scopes: Sequence[Scope], coming: Consumption) -> None:
        """Writes these scopes, with what may be reserved until the next time, `coming` included."""
        assert self._states is not None
        pending = {scope.name: PendingWrite(scope, coming) for scope in scopes}
        try:
            await self._states.write({name: each.state for name, each in pending.items()}, self._clock())
        except DatabaseError as error:
            if not self._failed:
                log.error("limits cannot be kept, so a crash would forget what was used: %s", error)  # noqa: TRY400
            self._failed = True
            for each in pending.values():
                each.failed()
            return
        self._failed = False
        for each in pending.values():
            each.written()

    def _find_scopes(self, caller: Caller, model_id: str, terms: ModelTerms, now: float) -> list[Scope]:
        found: list[Scope] = []
        key = self._keys.get(caller.key_id)
        for name, label, limits in scopes_of(caller.key_id, caller.name, key, model_id, terms.limits):
            scope = self._scopes.get(name)
            if scope is None:
                scope = self._scopes[name] = Scope(name, label, limits, now)
                if name in self._kept:
                    restore(scope, self._kept.pop(name), now)
            else:
                scope.advance(now)
                scope.label = label
                scope.configure(limits)
            if self._states is not None:
                write_before_use(scope)
            found.append(scope)
        if len(self._of_request) >= MAX_REMEMBERED:
            self._of_request.clear()
        self._of_request[caller.key_id, model_id] = found
        return found
