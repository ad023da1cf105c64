"""One thing that is limited, such as a key or a model: what it has left of its limits. Pure.

Tokens that a request may use are reserved until it ends and then charged as used. So at any time what was used and what
running requests may still use is within the limit: one minute's amount and what is refilled.
"""

from __future__ import annotations

import math
from typing import Final

from cortex.accounts.limits.budget_window import TOLERANCE, BudgetWindow
from cortex.accounts.limits.terms import Budget, Limits

SET_BACK_SECS: Final = 60.0
"""If the clock is set back by no more than this, nothing is refilled until it has caught up, so no time counts twice.
If it is set back by more, at most a minute's amount is refilled twice."""

Reserved = list[tuple[BudgetWindow, float]]


class Refusal:
    """Why a scope does not admit a request. `wait_secs`: when it would be admitted at the earliest, None if never.
    `limit` is what stands in its way, for people. `runs`: it also has to wait for requests that run. `window`: of the
    budget that refuses, None for another limit. `needs`: what the request may use, for people, "" if it does not
    matter."""

    def __init__(
        self, scope: Scope, limit: str, wait_secs: float | None, *, runs: bool, window: BudgetWindow | None, needs: str
    ) -> None:
        self.scope = scope
        self.limit = limit
        self.wait_secs = wait_secs
        self.runs = runs
        self.window = window
        self.needs = needs

    @property
    def how_long(self) -> float:
        """As `wait_secs`, infinite for never."""
        return math.inf if self.wait_secs is None else self.wait_secs


class Scope:
    """What is left of the limits of one scope. Times are seconds since 1970; `now` never has to increase.

    `requests` and `tokens` are the levels of the buckets at `at`. `reserved` are the tokens of running requests, which
    are still in the bucket. `running`: the number of requests.
    """

    def __init__(self, name: str, label: str, limits: Limits, now: float) -> None:
        """`name` is unique; `label` is for people, such as `key 'alice'`."""
        self.name = name
        self.label = label
        self.limits = limits
        self.rpm = -1.0  # no limit
        self.tpm = -1.0
        self.parallel = -1
        self.windows: list[BudgetWindow] = []
        self.requests = self.tokens = 0.0
        self.reserved = 0.0
        self.running = 0
        self.changed = False  # since it was last written
        self.must_be_written = False  # before it is used
        self.at = now
        self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """Puts limits into effect. What was used counts on; a limit that did not exist before begins full."""
        self.limits = limits
        rpm = -1.0 if limits.rpm is None else float(limits.rpm)
        tpm = -1.0 if limits.tpm is None else float(limits.tpm)
        self.requests = rpm if self.rpm < 0 else min(self.requests, rpm)
        self.tokens = tpm if self.tpm < 0 else min(self.tokens, tpm)
        self.rpm, self.tpm = rpm, tpm
        self.parallel = -1 if limits.parallel is None else limits.parallel
        before = {(window.unit, window.window, window.secs): window for window in self.windows}
        self.windows = [_window(budget, before) for budget in limits.budgets]

    def advance(self, now: float) -> None:
        """Refills the buckets and moves the windows."""
        elapsed = now - self.at
        if elapsed > 0:
            self.at = now
            self.requests = min(self.rpm, self.requests + elapsed * self.rpm / 60.0)
            self.tokens = min(self.tpm, self.tokens + elapsed * self.tpm / 60.0)
        elif elapsed < -SET_BACK_SECS:
            self._set_back(now)
        if self.windows:
            for window in self.windows:
                window.advance(now)

    def _set_back(self, now: float) -> None:
        """The clock was wrong, or is wrong now. Without this, nothing would be refilled and no window would end until
        it is as late again."""
        self.at = now
        for window in self.windows:
            window.count_as_used_now(now)

    @property
    def tokens_free(self) -> float:
        """What a request may reserve now."""
        return self.tokens - self.reserved

    @property
    def requests_full_in(self) -> float:
        """Seconds until all requests of a minute are free."""
        return (self.rpm - self.requests) * 60.0 / self.rpm if self.rpm > 0 else 0.0

    @property
    def tokens_full_in(self) -> float:
        """Seconds until all tokens of a minute are free, if running requests use all that they reserve."""
        return (self.tpm - self.tokens_free) * 60.0 / self.tpm if self.tpm > 0 else 0.0

    def needed(self, tokens: int) -> float:
        """What a request that may use so many tokens reserves of the bucket: at most all of it, so that a
        large request is admitted at all. A limit of 0 admits none."""
        wanted = float(tokens)
        return wanted if wanted < self.tpm or self.tpm == 0.0 else self.tpm

    def refuses(self, tokens: int, cost: float) -> bool:
        """After `advance`: whether a request that may use so many tokens, or so much money, is not admitted."""
        if (
            (self.rpm >= 0.0 and self.requests + TOLERANCE < 1.0)
            or (self.tpm >= 0.0 and self.tokens - self.reserved + TOLERANCE < self.needed(tokens))
            or 0 <= self.parallel <= self.running
        ):
            return True
        if self.windows:
            for window in self.windows:
                if not window.has_room(float(tokens) if window.in_tokens else cost):
                    return True
        return False

    def refusal(self, tokens: int, cost: float) -> Refusal | None:
        """Why it is not admitted."""
        return self._longest(tokens, cost) if self.refuses(tokens, cost) else None

    def _longest(self, tokens: int, cost: float) -> Refusal:
        """The refusing limit with the longest wait."""
        found: list[Refusal] = []
        if 0 <= self.parallel <= self.running:
            limit = _counted(self.parallel, "parallel request")
            found.append(self._refused(limit, 0.0 if self.parallel else None, runs=self.parallel > 0))
        if self.rpm >= 0 and self.requests + TOLERANCE < 1.0:
            wait = (1.0 - self.requests) * 60.0 / self.rpm if self.rpm else None
            found.append(self._refused(f"{_counted(self.rpm, 'request')} per minute", wait))
        lacking = self.needed(tokens) - self.tokens_free
        if self.tpm >= 0 and lacking > TOLERANCE:
            runs = self.tpm > 0 and self.needed(tokens) + self.reserved > self.tpm + TOLERANCE
            lacking -= self.reserved if runs else 0.0
            wait = max(0.0, lacking) * 60.0 / self.tpm if self.tpm else None
            found.append(
                self._refused(
                    f"{_counted(self.tpm, 'token')} per minute", wait, runs=runs, needs=_counted(tokens, "token")
                )
            )
        for window in self.windows:
            amount = float(tokens) if window.in_tokens else cost
            if not window.has_room(amount):
                runs = window.total + amount <= window.amount + TOLERANCE
                wait = 0.0 if runs else window.room_in(amount, self.at)
                needs = _counted(tokens, "token") if window.in_tokens else f"{cost:.6g} {window.unit}"
                found.append(Refusal(self, window.name, wait, runs=runs, window=window, needs=needs))
        return longest(found)

    def _refused(self, limit: str, wait_secs: float | None, *, runs: bool = False, needs: str = "") -> Refusal:
        return Refusal(self, limit, wait_secs, runs=runs, window=None, needs=needs)

    def reserve(self, tokens: int, cost: float, budgets: Reserved) -> float:
        """Counts a request. Returns what it reserves of the token bucket; adds to `budgets` what of them."""
        self.running += 1
        self.changed = True
        if self.rpm >= 0.0:
            self.requests -= 1.0
        if self.windows:
            for window in self.windows:
                amount = float(tokens) if window.in_tokens else cost
                window.reserve(amount)
                budgets.append((window, amount))
        if self.tpm < 0.0:
            return 0.0
        held = self.needed(tokens)
        self.reserved += held
        return held

    def is_allowed_unwritten(self, tokens: int, cost: float) -> bool:
        """Whether the state need not be written before such a request is admitted."""
        if self.must_be_written:
            return False
        if self.windows:
            for window in self.windows:
                if (float(tokens) if window.in_tokens else cost) > window.allowance:
                    return False
        return True

    def settle(self, held: float, tokens: int, now: float) -> None:
        """A request that had reserved `held` of the token bucket has ended and used so many tokens. Its budgets are
        settled by themselves."""
        self.advance(now)
        self.running -= 1
        self.changed = True
        if held > 0.0:
            self.reserved = max(0.0, self.reserved - held)
        if self.tpm >= 0.0:
            self.tokens -= tokens


def _counted(number: float, noun: str) -> str:
    """The number without an exponent."""
    return f"{number:.15g} {noun}{'' if number == 1 else 's'}"


def longest(refusals: list[Refusal]) -> Refusal:
    """The one with the longest wait."""
    return max(refusals, key=lambda refusal: refusal.how_long)


def _window(budget: Budget, before: dict[tuple[str, str, float], BudgetWindow]) -> BudgetWindow:
    rolling = not isinstance(budget.window, str)
    name, secs = ("", float(budget.window)) if rolling else (str(budget.window), 0.0)
    kept = before.get((budget.unit, name, secs))
    if kept is None:
        return BudgetWindow(budget.amount, budget.unit, name, secs)
    kept.amount = budget.amount
    return kept
