"""What is left of a scope's limits as JSON, for the database. Pure."""

from __future__ import annotations

from typing import Any

from cortex.accounts.limits.budget_window import BudgetWindow
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
    requests, tokens, budgets = state.get("requests"), state.get("tokens"), state.get("budgets", {})
    scope.at = float(state["at"])
    scope.requests = scope.rpm if requests is None else min(scope.rpm, float(requests))
    scope.tokens = scope.tpm if tokens is None else min(scope.tpm, float(tokens))
    for window in scope.windows:
        found = budgets.get(budget_name(window), {})
        window.used = {int(part): float(amount) for part, amount in found.get("used", {}).items()}
        window.total = sum(window.used.values())
        window.ends_at = float(found.get("ends_at", 0.0))


def dump_window(window: BudgetWindow) -> dict[str, Any]:
    return {"used": {str(part): amount for part, amount in window.used.items()}, "ends_at": window.ends_at}


def budget_name(window: BudgetWindow) -> str:
    """Tells the budgets of a scope apart, whatever their amounts."""
    return f"{window.unit}/{window.window or window.secs}"
