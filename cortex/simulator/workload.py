"""Generates traces from a seed: sessions of people and agents that use a few models often and the rest rarely, agents
that work in parallel, and batches at fixed hours."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from cortex.config.catalogue import Catalogue
from cortex.config.model_tables import ModelName
from cortex.simulator.trace import Ask
from shared.settings import SettingsError, SettingsModel, load_settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Hour = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Users(SettingsModel):
    """`[[users]]`: one kind of session: the mean number of requests, the median seconds of work per request, and the
    mean seconds from one answer to the next request. `parallel` sessions start together, a second apart on average.
    With `at_hours` they start at these hours of the trace, and at no other time. `key` names their API key."""

    model: ModelName
    key: str = Field(default="", max_length=100)
    requests: float = Field(default=5, ge=1, le=10_000)
    serve_secs: float = Field(default=5, gt=0)
    think_secs: float = Field(default=20, ge=0)
    weight: float | None = Field(default=None, gt=0)
    parallel: int = Field(default=1, ge=1, le=1000)
    at_hours: tuple[Hour, ...] = ()

    @model_validator(mode="after")
    def _starts_at_random_or_at_hours(self) -> Users:
        if self.at_hours and self.weight is not None:
            raise ValueError("weight and at_hours exclude each other: give only one of them")
        return self


class Workload(SettingsModel):
    """The file. The n-th kind of session starts 1 / n ** `skew` times as often as the first (Zipf's law), unless it
    has a `weight`. Waves and lulls both last `wave_secs` on average; in waves, sessions start `wave_factor` times as
    often as in lulls, at the same overall rate. `hourly` are relative rates of the hours of the trace, repeated when it
    is longer; their mean is `sessions_per_hour`. `spread` is the standard deviation of the logarithm of a session's
    service times."""

    hours: float = Field(default=2, gt=0, le=10_000)
    sessions_per_hour: float = Field(default=100, gt=0)
    skew: float = Field(default=1.0, ge=0)
    wave_factor: float = Field(default=3, ge=1)
    wave_secs: float = Field(default=600, gt=0)
    hourly: tuple[Weight, ...] = ()
    spread: float = Field(default=0.6, ge=0)
    users: tuple[Users, ...] = Field(min_length=1)

    @field_validator("hourly")
    @classmethod
    def _some_hour_has_sessions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and not sum(value):
            raise ValueError("at least one hour must be above 0")
        return value


def load_workload(path: Path, catalogue: Catalogue) -> Workload:
    """Reads the file; models may be aliases.

    Raises:
        SettingsError: one line for every problem.
    """
    workload = load_settings(Workload, path, env_prefix="", environ={})
    problems = [
        f"{path}: users[{index}].model = {users.model!r}: not in the catalogue"
        for index, users in enumerate(workload.users)
        if catalogue.profile(catalogue.resolve(users.model)) is None
    ]
    if problems:
        raise SettingsError(problems)
    return workload


def make_trace(workload: Workload, catalogue: Catalogue, *, seed: int, load: float = 1.0) -> list[Ask]:
    """A trace with `load` times the workload's sessions. The same seed gives the same trace."""
    chance = random.Random(seed)  # noqa: S311 - not used for secrets
    asks: list[Ask] = []
    for begin, users in _starts(workload, load, chance):
        asks += _session(users, catalogue.resolve(users.model), begin, workload, chance)
    asks.sort()
    return asks


def _starts(workload: Workload, load: float, chance: random.Random) -> Iterator[tuple[float, Users]]:
    """When sessions start: those at random times, then the batches."""
    usual = [users for users in workload.users if not users.at_hours]
    weights = [users.weight or 1 / rank**workload.skew for rank, users in enumerate(usual, start=1)]
    cumulative = list(accumulate(weights))
    for begin in _session_times(workload, load, chance) if usual else ():
        (users,) = chance.choices(usual, cum_weights=cumulative)
        yield begin, users
        yield from ((later, users) for later in _seconds_apart(begin, users.parallel - 1, chance))
    for users in workload.users:
        for hour in users.at_hours:
            count = max(1, round(users.parallel * load))
            yield from ((later, users) for later in _seconds_apart(hour * 3600, count, chance))


def _seconds_apart(begin: float, count: int, chance: random.Random) -> Iterator[float]:
    for _ in range(count):
        begin += chance.expovariate(1.0)
        yield begin


def _session_times(workload: Workload, load: float, chance: random.Random) -> Iterator[float]:
    """A Poisson process whose rate changes between waves and lulls, and from hour to hour."""
    end = workload.hours * 3600
    lull = 2 / (1 + workload.wave_factor) * workload.sessions_per_hour * load / 3600
    now, wave = 0.0, False
    turns_at = chance.expovariate(1 / workload.wave_secs)
    while now < end:
        of_hour, hour_ends_at = _rate_of_hour(workload, now)
        rate = lull * (workload.wave_factor if wave else 1) * of_hour
        pause = chance.expovariate(rate) if rate else math.inf
        changes_at = min(turns_at, hour_ends_at)
        if now + pause < changes_at:
            now += pause
            if now < end:
                yield now
            continue
        now = changes_at  # memoryless: redraw at the new rate
        if now == turns_at:
            wave = not wave
            turns_at = now + chance.expovariate(1 / workload.wave_secs)


def _rate_of_hour(workload: Workload, now: float) -> tuple[float, float]:
    """(rate as a multiple of the mean, when it changes)"""
    if not workload.hourly:
        return 1.0, math.inf
    hour = int(now // 3600)
    rate = workload.hourly[hour % len(workload.hourly)] * len(workload.hourly) / math.fsum(workload.hourly)
    return rate, (hour + 1) * 3600.0


def _session(users: Users, model: str, begin: float, workload: Workload, chance: random.Random) -> Iterator[Ask]:
    at = begin
    while at < workload.hours * 3600:
        secs = chance.lognormvariate(math.log(users.serve_secs), workload.spread)
        yield Ask(round(at, 3), model, round(secs, 3), users.key)
        if chance.random() < 1 / users.requests:
            return
        at += secs + (chance.expovariate(1 / users.think_secs) if users.think_secs else 0.0)
