"""The limits of a cortex that shares them with no other: in memory, written to its database each second.

After a crash nothing is forgotten: what may have been used since the last write counts as used. For buckets that is all
that was left; of budgets only as much may be used between two writes as the last one allowed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cortex.accounts.caller import Caller
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.limits.admission import HeldTokens, RequestTerms, ScopeTerms, scopes_of
from cortex.accounts.limits.exceeded import rate_state
from cortex.accounts.limits.kept_state import PendingWrite, restore, write_before_use
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.scope_state import dump_scope
from cortex.accounts.limits.terms import NO_RATES, UNLIMITED, Grant, KeyLimits, TokenBound

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.limit_states import LimitStates

log = logging.getLogger(__name__)

WRITE_SECS: Final = 1.0

MAX_REMEMBERED: Final = 1000
"""Models of one key whose terms are kept at hand."""
MAX_NAME: Final = 256
"""Characters of their names: a client may send any name, as long as a body may be."""
TERMS_SECS: Final = 2.0
"""How long remembered terms hold: a model's context may be that of the engines that serve it now."""


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
        self._started = clock()
        self._writing = asyncio.Lock()
        self._unkept: set[str] = set()  # names of the scopes whose last write failed, or was left out
        self._keys: Mapping[str, KeyLimits] = {}
        self._scopes: dict[str, Scope] = {}
        self._terms: dict[str, dict[str, RequestTerms]] = {}  # by key and model
        self._running: dict[int, HeldTokens] = {}
        self._last_number = 0

    @property
    def limited_models(self) -> Collection[str]:
        return self._model_terms.limited

    def use_keys(self, keys: Mapping[str, KeyLimits]) -> None:
        self._keys = keys
        self._terms.clear()

    def models_changed(self) -> None:
        self._terms.clear()

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        now = self._clock()
        terms = self._terms_for(caller, model_id, now)
        if not terms.scopes:
            return UNLIMITED
        tokens, cost = terms.most(bound)
        terms.check(bound, tokens, cost, now)
        if self._states is not None:
            for scope in terms.scopes:
                if not scope.is_allowed_unwritten(tokens, cost):
                    return None
        self._last_number += 1
        self._running[self._last_number] = terms.reserve(tokens, cost)
        return Grant(self._last_number, rate_state(terms.scopes))

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        async with self._writing:
            while (grant := self.admit(caller, model_id, bound)) is None:
                terms = self._terms_for(caller, model_id, self._clock())
                pending = _pending(terms.scopes, *terms.most(bound))
                if self._unkept:  # `run` tries again: a write that fails may take long, and would for each key in turn
                    self._not_written(pending)
                else:
                    await self._write(pending)
        return grant

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            held.settle(prompt + completion, held.terms.cost(prompt, completion, cached), self._clock())

    def settle_estimate(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            held.settle_estimate(prompt + completion, held.terms.cost(prompt, completion, cached), self._clock())

    def settle_at_bound(self, grant: Grant) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            held.settle(held.most_tokens, held.most_cost, self._clock())

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECS)
            changed = [
                scope
                for name, scope in self._scopes.items()
                if scope.changed and (scope.windows or name in self._unkept)
            ]
            if changed and self._states is not None:
                async with self._writing:
                    await self._write(_pending(changed, 0, 0.0))

    async def close(self) -> None:
        for number in list(self._running):
            self.settle_at_bound(Grant(number, NO_RATES))
        if self._states is not None and self._scopes:
            states = {scope.name: {**dump_scope(scope), "clean": True} for scope in self._scopes.values()}
            try:
                await self._states.write(states, self._clock())
            except DatabaseError as error:
                log.error("cannot save limits; the next start counts what may have been used: %s", error)  # noqa: TRY400

    async def _write(self, pending: dict[str, PendingWrite]) -> None:
        assert self._states is not None
        try:
            await self._states.write({name: each.state for name, each in pending.items()}, self._clock())
        except DatabaseError as error:
            if not self._unkept:
                message = "cannot save limits; usage since the last save is forgotten if cortex crashes: %s"
                log.error(message, error)  # noqa: TRY400 - the message says all
            self._not_written(pending)
            return
        if self._unkept:
            self._unkept = (self._unkept - pending.keys()) & self._scopes.keys()
            if not self._unkept:
                log.info("limits are saved again")
        for each in pending.values():
            each.written()

    def _not_written(self, pending: dict[str, PendingWrite]) -> None:
        self._unkept |= pending.keys()
        for each in pending.values():
            each.failed()

    def _terms_for(self, caller: Caller, model_id: str, now: float) -> RequestTerms:
        models = self._terms.get(caller.key_id)
        found = None if models is None else models.get(model_id)
        if found is None or not now <= found.valid_until <= now + TERMS_SECS:  # later: the clock was set back
            return self._find_terms(caller, model_id, now)
        return found

    def _find_terms(self, caller: Caller, model_id: str, now: float) -> RequestTerms:
        model = self._model_terms(model_id)
        key = self._keys.get(caller.key_id)
        scopes = [self._scope(each, now) for each in scopes_of(caller.key_id, caller.name, key, model_id, model.limits)]
        found = RequestTerms(scopes, model, now + TERMS_SECS)
        if len(model_id) <= MAX_NAME:
            models = self._terms.setdefault(caller.key_id, {})
            if len(models) >= MAX_REMEMBERED:
                models.clear()
            models[model_id] = found
        return found

    def _scope(self, terms: ScopeTerms, now: float) -> Scope:
        scope = self._scopes.get(terms.name)
        if scope is None:
            scope = self._scopes[terms.name] = Scope(terms.name, terms.label, terms.limits, now)
            if terms.name in self._kept:
                restore(scope, self._kept.pop(terms.name), self._started)
            if self._states is not None:
                scope.must_be_written = True
                write_before_use(scope)
        elif scope.limits != terms.limits:
            scope.advance(now)
            scope.configure(terms.limits)
            if self._states is not None:
                write_before_use(scope)
        scope.label = terms.label
        return scope


def _pending(scopes: Sequence[Scope], tokens: int, cost: float) -> dict[str, PendingWrite]:
    """Of these scopes, by name, with what may be reserved until the next write: at least so much."""
    return {scope.name: PendingWrite(scope, tokens, cost) for scope in scopes}
