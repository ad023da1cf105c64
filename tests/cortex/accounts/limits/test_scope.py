"""The arithmetic of limits: whatever the order of requests, no limit is exceeded and nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.accounts.limits.admission import HeldTokens, RequestTerms
from cortex.accounts.limits.budget_window import calendar_end, calendar_start
from cortex.accounts.limits.scope import Scope
from cortex.accounts.limits.terms import Budget, Limits, ModelTerms

START = 1_800_000_000.0
SLACK = 1e-3  # rounding of times, which are seconds since 1970


@dataclass
class Request:
    at: float
    bound: int
    held: HeldTokens
    used: int | None = None
    settled_at: float = 0.0


def reserved(scope: Scope, tokens: int, cost: float = 0.0) -> HeldTokens:
    return RequestTerms([scope], ModelTerms(), 0.0).reserve(tokens, cost)


@dataclass
class World:
    """A scope, and all that has been admitted."""

    scope: Scope
    now: float = START
    admitted: list[Request] = field(default_factory=list)

    def ask(self, bound: int) -> bool:
        self.scope.advance(self.now)
        if self.scope.refusal(bound, bound / 1000) is not None:
            return False
        self.admitted.append(Request(self.now, bound, reserved(self.scope, bound, bound / 1000)))
        return True

    def settle(self, which: int, share: float) -> None:
        running = [request for request in self.admitted if request.used is None]
        if running:
            request = running[which % len(running)]
            request.used, request.settled_at = int(request.bound * share), self.now
            request.held.settle(request.used, request.used / 1000, self.now)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 120), st.just(0.0)),
        st.tuples(st.just("settle"), st.integers(0, 10), st.floats(0, 1)),
        st.tuples(st.just("wait"), st.integers(0, 40), st.just(0.0)),
    ),
    max_size=60,
)


def played(limits: Limits, steps: list[tuple[str, int, float]]) -> World:
    world = World(Scope("key:a", "key 'a'", limits, START))
    for kind, number, share in steps:
        if kind == "ask":
            world.ask(number)
        elif kind == "settle":
            world.settle(number, share)
        else:
            world.now += number
        check_now(world)
    return world


def check_now(world: World) -> None:
    scope = world.scope
    running = [request for request in world.admitted if request.used is None]
    assert scope.running == len(running)
    assert scope.reserved == pytest.approx(sum(request.held.tokens[0] for request in running))
    if scope.parallel >= 0:
        assert len(running) <= scope.parallel
    if scope.rpm >= 0:
        assert scope.requests >= -SLACK


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 100), st.integers(1, 300), st.integers(1, 8))
def test_no_window_of_time_sees_more_than_a_minutes_amount_and_what_is_refilled(
    steps: list[tuple[str, int, float]], rpm: int, tpm: int, parallel: int
) -> None:
    world = played(Limits(rpm, tpm, parallel), steps)
    # A request whose bound exceeds the whole bucket is admitted alone; it may use what the bucket does not have.
    tokens = [(request.at, request.used or 0) for request in world.admitted if request.bound <= tpm]
    for begin in (request.at for request in world.admitted):
        for end in (request.at for request in world.admitted if request.at >= begin):
            inside = [request for request in world.admitted if begin <= request.at <= end]
            assert len(inside) <= rpm + rpm / 60 * (end - begin) + SLACK
            used = sum(amount for at, amount in tokens if begin <= at <= end)
            assert used <= tpm + tpm / 60 * (end - begin) + SLACK


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 300))
def test_tokens_settled_in_any_window_of_time_are_within_the_limit(
    steps: list[tuple[str, int, float]], tpm: int
) -> None:
    world = played(Limits(tpm=tpm), steps)
    done = [(r.settled_at, r.used) for r in world.admitted if r.used is not None and r.bound <= tpm]
    for begin, _ in done:
        for end, _ in done:
            used = sum(amount for at, amount in done if begin <= at <= end)
            assert used <= tpm + tpm / 60 * max(0, end - begin) + SLACK


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 500), st.sampled_from([30.0, 120.0]))
def test_a_rolling_budget_is_never_exceeded(steps: list[tuple[str, int, float]], amount: int, window: float) -> None:
    world = played(Limits(budgets=(Budget(amount, "tokens", window), Budget(amount / 2000, "EUR", window))), steps)
    done = [(r.settled_at, r.used) for r in world.admitted if r.used is not None]
    for end, _ in done:
        used = sum(tokens for at, tokens in done if end - window < at <= end)
        assert used <= amount / 2 + SLACK


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(1, 300), st.integers(1, 500))
def test_settling_gives_back_exactly_what_was_not_used(
    steps: list[tuple[str, int, float]], tpm: int, amount: int
) -> None:
    """After all have ended, what is left is what a bucket has that only saw what was used."""
    world = played(Limits(tpm=tpm, budgets=(Budget(amount, "tokens", "month"),)), steps)
    for _ in world.admitted:
        world.settle(0, 0.5)
    level, at = float(tpm), START
    for request in sorted(world.admitted, key=lambda r: r.settled_at):
        level = min(tpm, level + (request.settled_at - at) * tpm / 60)
        at = request.settled_at
        level -= request.used or 0
    world.scope.advance(world.now)
    assert world.scope.tokens == pytest.approx(min(tpm, level + (world.now - at) * tpm / 60), abs=SLACK)
    assert world.scope.tokens_free == pytest.approx(world.scope.tokens)
    (window,) = world.scope.windows
    assert window.total == sum(request.used or 0 for request in world.admitted)
    assert window.reserved == 0


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 100), st.integers(1, 300), st.integers(1, 120))
def test_a_request_is_admitted_after_the_wait_that_it_was_told(
    steps: list[tuple[str, int, float]], rpm: int, tpm: int, bound: int
) -> None:
    world = played(Limits(rpm, tpm, budgets=(Budget(400, "tokens", 120.0), Budget(500, "tokens", "hour"))), steps)
    for _ in world.admitted:
        world.settle(0, 1)
    world.scope.advance(world.now)
    refusal = world.scope.refusal(bound, 0)
    if refusal is None:
        return
    assert not refusal.runs
    assert refusal.wait_secs is not None
    before = world.now
    if refusal.wait_secs > 1:
        world.scope.advance(before + refusal.wait_secs - 0.5)
        assert world.scope.refusal(bound, 0) is not None
    world.scope.advance(before + refusal.wait_secs + 1e-6)
    assert world.scope.refusal(bound, 0) is None


def test_a_request_larger_than_the_bucket_takes_all_of_it_and_is_paid_off_later() -> None:
    world = World(Scope("key:a", "key 'a'", Limits(tpm=60), START))
    assert world.ask(1000)
    assert not world.ask(1)
    world.settle(0, 0.2)  # 200 tokens: 140 more than the bucket had
    world.now += 139
    assert not world.ask(1)
    world.now += 2
    assert world.ask(1)


def test_new_limits_count_what_was_used_before() -> None:
    scope = Scope("key:a", "key 'a'", Limits(rpm=10, budgets=(Budget(100, "tokens", "day"),)), START)
    for _ in range(4):
        reserved(scope, 20).settle(20, 0, START)
    scope.configure(Limits(rpm=5, tpm=50, budgets=(Budget(90, "tokens", "day"),)))
    assert (scope.requests, scope.tokens) == (5, 50)
    assert scope.refusal(10, 0) is None
    refusal = scope.refusal(11, 0)
    assert refusal is not None
    assert refusal.window is scope.windows[0]


def test_a_clock_that_is_set_back_neither_refills_nor_forgets() -> None:
    """What was used counts in the window of the new time, and leaves with it: a clock that was years ahead must not
    take a budget away for years."""
    budgets = (Budget(1, "tokens", "hour"), Budget(1, "tokens", 3600.0))
    scope = Scope("key:a", "key 'a'", Limits(rpm=1, budgets=budgets), START)
    reserved(scope, 1).settle(1, 0, START)
    earlier = calendar_start("hour", START - 300_000_000)
    scope.advance(earlier)
    assert scope.refusal(0, 0) is not None
    scope.advance(earlier + 60)
    assert scope.refusal(0, 0) is None
    for secs, room in ((60, [False, False]), (3600, [True, False]), (3661, [True, True])):
        scope.advance(earlier + secs)
        assert [window.has_room(1) for window in scope.windows] == room


def test_no_time_is_refilled_twice() -> None:
    """A clock that is corrected by seconds, back and forth, gives nothing away."""
    scope = Scope("key:a", "key 'a'", Limits(rpm=60, tpm=60), START)
    for _ in range(60):
        reserved(scope, 1).settle(1, 0, START)
    for now in (START - 30, START, START - 59, START):
        scope.advance(now)
        assert (scope.requests, scope.tokens) == (0, 0)
    scope.advance(START + 1)
    assert (scope.requests, scope.tokens) == (1, 1)


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        ("hour", "2026-02-28T23:00", "2026-03-01T00:00"),
        ("day", "2026-02-28T00:00", "2026-03-01T00:00"),
        ("week", "2026-02-23T00:00", "2026-03-02T00:00"),
        ("month", "2026-02-01T00:00", "2026-03-01T00:00"),
    ],
)
def test_calendar_windows_begin_and_end_in_utc(window: str, start: str, end: str) -> None:
    now = datetime(2026, 2, 28, 23, 59, 59, tzinfo=timezone.utc).timestamp()
    expected = [datetime.fromisoformat(f"{at}+00:00").timestamp() for at in (start, end)]
    assert [calendar_start(window, now), calendar_end(window, now)] == expected
