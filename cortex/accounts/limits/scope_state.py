"""What is left of a scope's limits as JSON, for the database. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cortex.accounts.limits.budget_window import CALENDAR, BudgetWindow
from cortex.accounts.limits.scope import Scope


def dump_scope(scope: Scope) -> dict[str, Any]:
    """What has been used. Reservations are left out."""
    return {
        "at": scope.at,
        "requests": scope.requests if scope.rpm >= 0 else None,
        "tokens": scope.tokens if scope.tpm >= 0 else None,
        "budgets": {budget_name(window): dump_window(window) for window in scope.windows},
    }


def restore_scope(scope: Scope, state: dict[str, Any]) -> None:
    """Puts what `dump_scope` returned into a scope, as far as it still has these limits. Others are full."""
    scope.at = float(state["at"])
    scope.requests = _level(state, "requests", scope.rpm)
    scope.tokens = _level(state, "tokens", scope.tpm)
    budgets = state.get("budgets", {})
    for window in scope.windows:
        _restore_window(window, budgets.get(budget_name(window), {}))


def _level(state: Mapping[str, Any], kind: str, per_minute: float) -> float:
    """The level of a bucket at the time of the state."""
    level, at = state.get(kind), float(state["at"])
    if level is None:
        return per_minute
    elapsed = max(0.0, at - float(state.get(f"{kind}_at", at)))
    return min(per_minute, float(level) + elapsed * per_minute / 60.0)


def _restore_window(window: BudgetWindow, state: Mapping[str, Any]) -> None:
    window.used = {int(part): float(amount) for part, amount in state.get("used", {}).items()}
    window.total = sum(window.used.values())
    window.ends_at = float(state.get("ends_at", 0.0))


def window_named(name: str, state: Mapping[str, Any]) -> BudgetWindow:
    """The window of a budget whose amount is not known, with what `dump_window` returned."""
    unit, _, length = name.rpartition("/")
    calendar, secs = (length, 0.0) if length in CALENDAR else ("", float(length))
    window = BudgetWindow(math.inf, unit, calendar, secs)
    _restore_window(window, state)
    return window


def levels_unknown_to(scope: Scope, state: Mapping[str, Any]) -> dict[str, Any]:
    """The levels of buckets that the state has and the scope does not, and when they were so: they have not been
    refilled since."""
    found: dict[str, Any] = {}
    for kind, limit in (("requests", scope.rpm), ("tokens", scope.tpm)):
        if limit < 0 and state.get(kind) is not None:
            found |= {kind: state[kind], f"{kind}_at": state.get(f"{kind}_at", state["at"])}
    return found


def dump_window(window: BudgetWindow) -> dict[str, Any]:
    return {"used": {str(part): amount for part, amount in window.used.items()}, "ends_at": window.ends_at}


def budget_name(window: BudgetWindow) -> str:
    """Tells the budgets of a scope apart, whatever their amounts."""
    return f"{window.unit}/{window.window or window.secs}"
