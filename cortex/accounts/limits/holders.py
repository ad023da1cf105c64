"""A scope that several cortexes share: what each has reserved, and the state of all in one row. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.scope_state import (
    budget_name,
    dump_scope,
    dump_window,
    levels_unknown_to,
    restore_scope,
    window_named,
)


class Holdings(msgspec.Struct, frozen=True):
    """What the running requests of one cortex have reserved of a scope. `budgets`: by `budget_name`."""

    running: int = 0
    tokens: float = 0.0
    budgets: dict[str, float] = {}

    def without(self, others: Iterable[Holdings]) -> Holdings:
        """The rest of these."""
        running, tokens, budgets = self.running, self.tokens, dict(self.budgets)
        for other in others:
            running, tokens = running - other.running, tokens - other.tokens
            for name in budgets:
                budgets[name] -= other.budgets.get(name, 0.0)
        return Holdings(running, max(0.0, tokens), {name: max(0.0, amount) for name, amount in budgets.items()})


NONE = Holdings()


class LoadedRow(NamedTuple):
    """What a row says beyond its scope. `others`: what each other living cortex holds. `unknown`: what is left of
    limits that this cortex does not have, but perhaps another that has read a newer file of keys."""

    others: dict[str, Holdings]
    unknown: dict[str, Any]


def holdings_of(scope: Scope) -> Holdings:
    """What all cortexes have reserved."""
    budgets = {budget_name(window): window.reserved for window in scope.windows}
    return Holdings(scope.running, scope.reserved, budgets)


def load_shared(
    scope: Scope, state: Mapping[str, Any], *, me: str, own: Holdings | None, alive: Collection[str], now: float
) -> LoadedRow:
    """Puts the row into the scope. What dead cortexes held counts as used.

    `own`: what `me` holds, as it knows best.
    """
    if "at" in state:
        restore_scope(scope, dict(state))
    else:
        scope.at, scope.requests, scope.tokens = now, scope.rpm, scope.tpm
        for window in scope.windows:
            window.used, window.total, window.ends_at = {}, 0.0, 0.0
    scope.advance(now)
    holders = {name: msgspec.convert(written, Holdings) for name, written in state.get("holders", {}).items()}
    others = {name: holdings for name, holdings in holders.items() if name in alive and name != me}
    dead = [holdings for name, holdings in holders.items() if name not in alive]
    if scope.tpm >= 0:
        scope.tokens -= sum(each.tokens for each in dead)
    for window in scope.windows:
        window.settle(0.0, _held(budget_name(window), dead), now)
    _hold(scope, [*others.values(), own or NONE])
    return LoadedRow(others, _unknown_to(scope, state, dead, now))


def _hold(scope: Scope, holders: Sequence[Holdings]) -> None:
    scope.running = sum(each.running for each in holders)
    scope.reserved = sum(each.tokens for each in holders)
    for window in scope.windows:
        window.reserved = _held(budget_name(window), holders)


def _held(budget: str, holders: Sequence[Holdings]) -> float:
    return sum(each.budgets.get(budget, 0.0) for each in holders)


def _unknown_to(scope: Scope, state: Mapping[str, Any], dead: Sequence[Holdings], now: float) -> dict[str, Any]:
    """As `LoadedRow.unknown`. Budgets of which nothing is used any more are left out, so that the row does not grow."""
    unknown = levels_unknown_to(scope, state)
    if "tokens" in unknown:
        unknown["tokens"] -= sum(each.tokens for each in dead)
    written: Mapping[str, Any] = state.get("budgets", {})
    budgets: dict[str, Any] = {}
    for name in {*written, *(name for each in dead for name in each.budgets)} - set(map(budget_name, scope.windows)):
        window = window_named(name, written.get(name, {}))
        window.settle(0.0, _held(name, dead), now)
        if window.used:
            budgets[name] = dump_window(window)
    return {**unknown, "budgets": budgets}


def shared_state(scope: Scope, holders: Mapping[str, Holdings], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The row: what was used, and what each cortex holds. `unknown`: of the row before."""
    held = {name: msgspec.to_builtins(each) for name, each in holders.items() if each.running}
    known = dump_scope(scope)
    return {**known, **unknown, "budgets": {**unknown["budgets"], **known["budgets"]}, "holders": held}
