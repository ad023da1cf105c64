"""The limits of several cortexes on one PostgreSQL database.

All requests that wait for admission, and all that have ended meanwhile, share one transaction, which locks the rows of
their scopes. A row holds what was used, and for each cortex what its running requests have reserved. If a cortex shows
no sign of life, its requests no longer count as running, and all that they had reserved counts as used.

The transactions are numbered, and the cortex's own row has the number of the last one that was committed. If the answer
to a commit is lost, the next transaction tells by it whether those that had ended are charged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cortex.accounts.caller import Caller
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.limits.admission import HeldTokens, RequestTerms, scopes_of
from cortex.accounts.limits.exceeded import LimitExceeded, rate_state
from cortex.accounts.limits.holders import Holdings, holdings_of, load_shared, shared_state
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.terms import UNLIMITED, Grant, KeyLimits, TokenBound
from shared.errors import ServiceError, Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import LIMITS_UNKNOWN_SECS
from shared.tasks import timeout

if TYPE_CHECKING:  # imports SQLAlchemy
    from cortex.accounts.database.limit_states import LimitStates, LockedStates

log = logging.getLogger(__name__)

SIGN_OF_LIFE_SECS: Final = 1.0
DEAD_SECS: Final = 5.0
"""A cortex that shows no sign of life for this time is dead."""
FORGOTTEN_SECS: Final = 3600.0
"""After this the row of a dead cortex is deleted."""
DATABASE_SECS: Final = 5.0
"""How long one transaction may take."""
_CORTEX: Final = "cortex:"


class _Asked(NamedTuple):
    """A request of this bound that waits for admission. It may use so many tokens, which cost so much."""

    terms: RequestTerms
    bound: TokenBound
    tokens: int
    cost: float
    answer: asyncio.Future[Grant]


class _Settled(NamedTuple):
    """A request that has ended. `batch`: the first transaction that was to charge it; 0 before that."""

    held: HeldTokens
    tokens: int
    cost: float
    batch: int = 0


class SharedLimiter:
    """Implements LimitOwner for several cortexes. Each admission waits for the database."""

    def __init__(self, model_terms: ModelTermsTable, states: LimitStates) -> None:
        self._model_terms = model_terms
        self._states = states
        self._name = f"{_CORTEX}{uuid.uuid4().hex}"
        self._keys: Mapping[str, KeyLimits] = {}
        self._scopes: dict[str, Scope] = {}
        self._own: dict[str, Holdings] = {}  # by scope, as last committed
        self._running: dict[int, HeldTokens] = {}
        self._numbers = itertools.count(1)
        self._batches = itertools.count(1)
        self._asked: list[_Asked] = []
        self._settled: list[_Settled] = []
        self._wanted = asyncio.Event()
        self._failed = False

    @property
    def limited_models(self) -> Collection[str]:
        return self._model_terms.limited

    def use_keys(self, keys: Mapping[str, KeyLimits]) -> None:
        self._keys = keys

    def models_changed(self) -> None:
        return  # the limits are looked up for each request

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        return None

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        terms = self._find_terms(caller, model_id)
        if not terms.scopes:
            return UNLIMITED
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(terms, bound, *terms.most(bound), answer))
        self._wanted.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.settle(answer.result(), 0, 0, 0)  # it came just before
            raise

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            self._end(held, prompt + completion, held.terms.cost(prompt, completion, cached))

    def settle_estimate(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            cost = held.terms.cost(prompt, completion, cached)
            self._end(held, min(prompt + completion, held.most_tokens), min(cost, held.most_cost))

    def settle_at_bound(self, grant: Grant) -> None:
        held = self._running.pop(grant.number, None)
        if held is not None:
            self._end(held, held.most_tokens, held.most_cost)

    def _end(self, held: HeldTokens, tokens: int, cost: float) -> None:
        self._settled.append(_Settled(held, tokens, cost))
        self._wanted.set()

    async def run(self) -> None:
        while True:
            try:
                async with timeout(SIGN_OF_LIFE_SECS):
                    await self._wanted.wait()
            except asyncio.TimeoutError:
                if not self._own:
                    continue
            await self._batch()
            if self._failed:
                await asyncio.sleep(SIGN_OF_LIFE_SECS)

    async def close(self) -> None:
        for held in list(self._running.values()):
            self._end(held, held.most_tokens, held.most_cost)
        self._running.clear()
        await self._batch()
        with contextlib.suppress(DatabaseError, asyncio.TimeoutError):
            async with timeout(DATABASE_SECS), self._states.locked([]) as rows:
                await rows.delete([self._name])

    async def _batch(self) -> None:
        """Admits and settles all that has come together."""
        self._wanted.clear()
        number, asked = next(self._batches), [each for each in self._asked if not each.answer.done()]
        settled = [each if each.batch else each._replace(batch=number) for each in self._settled]
        self._asked, self._settled = [], []
        names = {scope.name for each in asked for scope in each.terms.scopes}
        names |= {scope.name for each in settled for scope in each.held.scopes}
        try:
            async with timeout(DATABASE_SECS), self._states.locked(names | {self._name}) as rows:
                answers, own = await self._decide(rows, number, asked, settled)
        except BaseException as error:
            self._settled = settled + self._settled
            for each in asked:
                _fail(each.answer, _unknown())
            if not isinstance(error, (DatabaseError, asyncio.TimeoutError)):
                raise
            self._report(str(error) or f"the database did not answer in {DATABASE_SECS:g} s")
            return
        if self._failed:
            log.info("limits can be checked again")
        self._failed = False
        self._own = {name: holdings for name, holdings in {**self._own, **own}.items() if holdings.running}
        for each, answer in zip(asked, answers, strict=True):
            self._answer(each, answer)

    async def _decide(
        self, rows: LockedStates, number: int, asked: list[_Asked], settled: list[_Settled]
    ) -> tuple[list[HeldTokens | LimitExceeded], dict[str, Holdings]]:
        """What becomes of those that asked, and what this cortex holds then."""
        seen = await rows.last_written(_CORTEX)
        alive = {name for name, at in seen.items() if at > rows.now - DEAD_SECS} | {self._name}
        scopes = _by_name(asked, settled)
        rows_before = {
            name: load_shared(
                scope, rows.states.get(name, {}), me=self._name, own=self._own.get(name), alive=alive, now=rows.now
            )
            for name, scope in scopes.items()
        }
        committed = int(rows.states.get(self._name, {}).get("batch", 0))
        for each in settled:
            charged = each.batch <= committed
            each.held.settle(0 if charged else each.tokens, 0.0 if charged else each.cost, rows.now)
        answers = [_decision(each, rows.now) for each in asked]
        own: dict[str, Holdings] = {}
        states: dict[str, dict[str, Any]] = {}
        for name, scope in scopes.items():
            others, unknown = rows_before[name]
            own[name] = holdings_of(scope).without(others.values())
            states[name] = shared_state(scope, {**others, self._name: own[name]}, unknown)
        await rows.write({**states, self._name: {"batch": number}})
        gone = [name for name, at in seen.items() if at < rows.now - FORGOTTEN_SECS and name != self._name]
        await rows.delete(gone)
        return answers, own

    def _answer(self, asked: _Asked, answer: HeldTokens | LimitExceeded) -> None:
        if isinstance(answer, LimitExceeded):
            _fail(asked.answer, answer)
        elif asked.answer.done():  # cancelled meanwhile
            self._end(answer, 0, 0.0)
        else:
            number = next(self._numbers)
            self._running[number] = answer
            asked.answer.set_result(Grant(number, rate_state(asked.terms.scopes)))

    def _report(self, reason: str) -> None:
        if not self._failed:
            log.error("limits cannot be checked, so requests that have any are refused: %s", reason)
        self._failed = True
        if self._settled:
            self._wanted.set()

    def _find_terms(self, caller: Caller, model_id: str) -> RequestTerms:
        model = self._model_terms(model_id)
        found: list[Scope] = []
        key = self._keys.get(caller.key_id)
        for name, label, limits in scopes_of(caller.key_id, caller.name, key, model_id, model.limits):
            scope = self._scopes.get(name)
            if scope is None:
                scope = self._scopes[name] = Scope(name, label, limits, 0.0)
            elif scope.limits != limits:
                scope.configure(limits)
            scope.label = label
            found.append(scope)
        return RequestTerms(found, model, 0.0)


def _by_name(asked: Iterable[_Asked], settled: Iterable[_Settled]) -> dict[str, Scope]:
    found = {scope.name: scope for each in asked for scope in each.terms.scopes}
    return found | {scope.name: scope for each in settled for scope in each.held.scopes}


def _decision(asked: _Asked, now: float) -> HeldTokens | LimitExceeded:
    try:
        asked.terms.check(asked.bound, asked.tokens, asked.cost, now)
    except LimitExceeded as refused:
        return refused
    return asked.terms.reserve(asked.tokens, asked.cost)


def _fail(answer: asyncio.Future[Any], error: ServiceError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _unknown() -> ServiceError:
    return Unavailable(
        "the limits of this request cannot be checked: cortex's database does not answer",
        code=ErrorCode.DATABASE_UNAVAILABLE,
        retry_after=LIMITS_UNKNOWN_SECS,
    )
