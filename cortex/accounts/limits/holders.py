"""A scope that several cortexes share: what each has reserved, and the state of all in one row. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from cortex.accounts.limits.budget_window import BudgetWindow
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.scope_state import budget_name, dump_scope, restore_scope


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


def holdings_of(scope: Scope) -> Holdings:
    """What all cortexes have reserved."""
    budgets = {budget_name(window): window.reserved for window in scope.windows}
    return Holdings(scope.running, scope.reserved, budgets)


def load_shared(
    scope: Scope, state: Mapping[str, Any], *, me: str, own: Holdings | None, alive: Collection[str], now: float
) -> dict[str, Holdings]:
    """Puts the row into the scope. Returns what each other living cortex holds; what a dead one held counts as used.

    `own`: what `me` holds, as it knows best.
    """
    if "at" in state:
        restore_scope(scope, dict(state))
    else:
        scope.at, scope.requests, scope.tokens = now, scope.rpm, scope.tpm
        for window in scope.windows:
            window.used, window.total, window.ends_at = {}, 0.0, 0.0
    scope.advance(now)
    others: dict[str, Holdings] = {}
    for name, written in state.get("holders", {}).items():
        holdings = msgspec.convert(written, Holdings)
        if name in alive:
            if name != me:
                others[name] = holdings
            continue
        if scope.tpm >= 0:
            scope.tokens -= holdings.tokens
        for window in scope.windows:
            window.settle(0.0, holdings.budgets.get(budget_name(window), 0.0), now)
    _hold(scope, [*others.values(), own or NONE])
    return others


def _hold(scope: Scope, holders: list[Holdings]) -> None:
    scope.running = sum(each.running for each in holders)
    scope.reserved = sum(each.tokens for each in holders)
    for window in scope.windows:
        window.reserved = _held(window, holders)


def _held(window: BudgetWindow, holders: list[Holdings]) -> float:
    name = budget_name(window)
    return sum(each.budgets.get(name, 0.0) for each in holders)


def shared_state(scope: Scope, holders: Mapping[str, Holdings]) -> dict[str, Any]:
    """The row: what was used, and what each cortex holds."""
    held = {name: msgspec.to_builtins(each) for name, each in holders.items() if each.running}
    return {**dump_scope(scope), "holders": held}
