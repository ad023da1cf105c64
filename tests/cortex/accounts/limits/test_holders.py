"""The row of a scope that cortexes with different limits share."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.accounts.limits.holders import Holdings, holdings_of, load_shared, shared_state
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.terms import Budget, Limits

NOW = 1_800_000_000.0
HOUR = Budget(100, "tokens", 3600.0)
NEWER = Limits(rpm=60, tpm=600, budgets=(HOUR, Budget(50, "EUR", "day")))
OLDER = Limits(parallel=5)


def used(limits: Limits, row: dict[str, Any], now: float, tokens: int, *, cost: float = 0.0) -> dict[str, Any]:
    """The row after a request of a cortex with these limits."""
    scope = Scope("key:a", "key", limits, now)
    others, unknown = load_shared(scope, row, me="me", own=None, alive=["me"], now=now)
    held = scope.reserve(tokens, cost, [])
    scope.settle(held, tokens, now)
    for window in scope.windows:
        window.settle(tokens if window.in_tokens else cost, tokens if window.in_tokens else cost, now)
    return shared_state(scope, {**others, "me": holdings_of(scope)}, unknown)


def loaded(limits: Limits, row: dict[str, Any], now: float) -> Scope:
    scope = Scope("key:a", "key", limits, now)
    load_shared(scope, row, me="me", own=None, alive=["me"], now=now)
    return scope


def test_a_cortex_without_the_limits_of_another_keeps_them() -> None:
    """Buckets refill over the whole time, budgets stay until their window has ended."""
    row = used(NEWER, {}, NOW, 80, cost=7.0)
    for later in (1.0, 2.0, 3.0):
        row = used(OLDER, row, NOW + later, 5)
    scope = loaded(NEWER, row, NOW + 4)
    assert scope.requests == 60.0
    assert scope.tokens == pytest.approx(600 - 80 + 4 * 10)
    assert [window.total for window in scope.windows] == [80.0, 7.0]
    row = used(OLDER, row, NOW + 2 * 86_400, 5)
    assert row["budgets"] == {}
    scope = loaded(NEWER, row, NOW + 2 * 86_400)
    assert (scope.tokens, [window.total for window in scope.windows]) == (600.0, [0.0, 0.0])


def test_what_a_dead_cortex_held_of_unknown_limits_counts_as_used() -> None:
    row = used(NEWER, {}, NOW, 10)
    row["holders"] = {"dead": {"running": 1, "tokens": 30.0, "budgets": {"tokens/3600.0": 30.0, "EUR/day": 2.0}}}
    row = used(OLDER, row, NOW, 5)
    assert row["holders"] == {}
    scope = loaded(NEWER, row, NOW)
    assert (scope.tokens, [window.total for window in scope.windows]) == (560.0, [40.0, 2.0])


def test_limits_that_another_still_uses_stay_reserved() -> None:
    """Also those that this cortex does not have."""
    other = Holdings(1, 30.0, {"tokens/3600.0": 30.0})
    row = shared_state(Scope("key:a", "key", NEWER, NOW), {"other": other}, {"budgets": {}})
    scope = Scope("key:a", "key", OLDER, NOW)
    others, unknown = load_shared(scope, row, me="me", own=None, alive=["me", "other"], now=NOW)
    row = shared_state(scope, others, unknown)
    scope = Scope("key:a", "key", NEWER, NOW)
    load_shared(scope, row, me="me", own=None, alive=["me", "other"], now=NOW)
    assert (scope.running, scope.reserved, scope.windows[0].reserved) == (1, 30.0, 30.0)
