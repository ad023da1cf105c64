"""What has been used of a budget in its current window, in the calendar or rolling. Pure."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import Final

from cortex.config.durations import exact_duration

BINS: Final = 60
"""A rolling window is counted in this many parts. A part leaves once all of it is outside the window."""

TOLERANCE: Final = 1e-6
"""Added in comparisons, so that rounding does not refuse a request a moment longer than the time it was told."""

CALENDAR: Final = ("hour", "day", "week", "month")


def calendar_start(window: str, now: float) -> float:
    """When the hour, day, week (from Monday) or month of `now` began, in UTC. Times are seconds since 1970."""
    at = datetime.fromtimestamp(now, timezone.utc).replace(minute=0, second=0, microsecond=0)
    if window != "hour":
        at = at.replace(hour=0)
    if window == "week":
        at -= timedelta(days=at.weekday())
    elif window == "month":
        at = at.replace(day=1)
    return at.timestamp()


def calendar_end(window: str, now: float) -> float:
    """When the next window begins."""
    start = calendar_start(window, now)
    if window == "month":
        return calendar_start(window, start + 32 * 86400)
    return start + {"hour": 3600, "day": 86400, "week": 7 * 86400}[window]


class BudgetWindow:
    """What one budget has left. What is reserved counts as used until it is settled.

    `used` are the amounts by the number of their part: one part for a calendar window, `BINS` for a rolling one.
    `allowance`: what may be reserved before the state has to be written again; infinite if it is not written.
    """

    def __init__(self, amount: float, unit: str, window: str, secs: float) -> None:
        """`window` is one of CALENDAR, or "" for a rolling one of `secs` seconds."""
        self.amount = amount
        self.unit = unit
        self.in_tokens = unit == "tokens"
        self.window = window
        self.secs = secs
        self.reserved = 0.0
        self.used: dict[int, float] = {}
        self.ends_at = 0.0  # of a calendar window
        self.total = 0.0  # of `used`
        self.allowance = math.inf
        self.granted = 0.0  # the allowance after the last write

    @property
    def name(self) -> str:
        """As in `20 EUR per month`."""
        period = self.window or f"{exact_duration(self.secs)} (rolling)"
        return f"{self.amount:.15g} {self.unit} per {period}"

    def advance(self, now: float) -> None:
        """Forgets what is outside the window. If the clock was set back, nothing is."""
        if self.window:
            if now >= self.ends_at:
                self.used, self.total = {}, 0.0
                if math.isfinite(self.allowance):
                    self.allowance = 0.0  # what was written is of the window before
                self.ends_at = calendar_end(self.window, now)
            return
        oldest = self._part(now) - BINS
        if self.used and min(self.used) < oldest:
            self.used = {part: amount for part, amount in self.used.items() if part >= oldest}
            self.total = math.fsum(self.used.values())

    def count_as_used_now(self, now: float) -> None:
        """What was used later than now, by a clock that was set back since, counts from now on."""
        if self.window:
            self.ends_at = calendar_end(self.window, now)
        elif self.used:
            self.used = {self._part(now): self.total}

    def has_room(self, amount: float) -> bool:
        """After `advance`: whether this may be reserved."""
        return self.total + self.reserved + amount <= self.amount + TOLERANCE

    def room_in(self, amount: float, now: float) -> float | None:
        """Seconds until `amount` can be reserved, if what is reserved now is used up; None if it never can. At least
        0."""
        if amount > self.amount + TOLERANCE:
            return None
        if self.window:
            return max(0.0, self.ends_at - now)
        left, width = self.amount + TOLERANCE - self.reserved - amount - self.total, self.secs / BINS
        for part in sorted(self.used):
            left += self.used[part]
            if left >= 0:
                return max(0.0, (part + BINS + 1) * width - now)
        return self.secs

    def reserve(self, amount: float) -> None:
        """Until `settle`."""
        self.reserved += amount
        self.allowance -= amount

    def settle(self, reserved: float, used: float, now: float) -> None:
        """A request that had reserved so much has used so much."""
        self.advance(now)
        self.reserved = max(0.0, self.reserved - reserved)
        if used:
            part = self._part(now)
            self.used[part] = self.used.get(part, 0.0) + used
            self.total += used

    def _part(self, now: float) -> int:
        return 0 if self.window else math.floor(now / (self.secs / BINS))
