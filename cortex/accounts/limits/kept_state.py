"""What a cortex alone writes of its limits, so that it forgets nothing if it crashes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from cortex.accounts.limits.budget_window import BudgetWindow
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.scope_state import budget_name, dump_scope, restore_scope

SHARE_UNWRITTEN: Final = 0.01
"""The share of a budget that may be used between two writes, unless more was used lately."""
_USED_BEFORE: Final = "used_before"


def write_before_use(scope: Scope) -> None:
    """A budget that is new in this scope may be used only once it has been written."""
    for window in scope.windows:
        if math.isinf(window.allowance):
            window.allowance = 0.0


def left_by_crash(states: Mapping[str, dict[str, Any]], started: float) -> dict[str, dict[str, Any]]:
    """Those of these states, as a start at `started` finds them, that a crash has just left, with that time: what may
    have been used since they were written was used before it, also if their scope is used again only weeks later."""
    return {
        name: {**state, _USED_BEFORE: started}
        for name, state in states.items()
        if not state.get("clean") and _USED_BEFORE not in state
    }


def restore(scope: Scope, state: dict[str, Any], now: float) -> None:
    """Puts back what was written last before this cortex started, at `now`. If that was while another ran, all that may
    have been used since counts."""
    restore_scope(scope, state)
    if not state.get("clean"):
        used_before = float(state.get(_USED_BEFORE, now))
        scope.advance(used_before)
        scope.requests, scope.tokens = min(scope.requests, 0.0), min(scope.tokens, 0.0)
        for window in scope.windows:
            unwritten = float(state.get("unwritten", {}).get(budget_name(window), 0.0))
            window.settle(0.0, unwritten, used_before)
    scope.advance(now)


class PendingWrite:
    """What is being written of one scope."""

    def __init__(self, scope: Scope, tokens: int, cost: float) -> None:
        """At least so much may be reserved before the next write."""
        scope.changed = False
        self._scope = scope
        self._windows = [
            (
                window,
                window.ends_at,
                window.allowance,
                _next_allowance(window, float(tokens) if window.in_tokens else cost),
            )
            for window in scope.windows
        ]
        unwritten = {budget_name(window): window.reserved + planned for window, _, _, planned in self._windows}
        self.state: dict[str, Any] = {**dump_scope(scope), "unwritten": unwritten}

    def written(self) -> None:
        self._scope.must_be_written = False
        for window, ends_at, before, planned in self._windows:
            if window.ends_at == ends_at:
                used_meanwhile = before - window.allowance if math.isfinite(before) else 0.0
                window.allowance = planned - used_meanwhile
                window.granted = planned

    def failed(self) -> None:
        """Better to forget something after a crash than to refuse every request."""
        self._scope.changed = True
        self._scope.must_be_written = False
        for window, *_ in self._windows:
            window.allowance = math.inf


def _next_allowance(window: BudgetWindow, needed: float) -> float:
    lately = max(0.0, window.granted - window.allowance) if math.isfinite(window.allowance) else 0.0
    return needed + max(2 * lately, SHARE_UNWRITTEN * window.amount)
