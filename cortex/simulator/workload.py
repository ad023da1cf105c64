"""Generates traces from a seed: sessions of people and agents that use a few models often and the rest rarely."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from pydantic import Field

from cortex.config.catalogue import Catalogue, ModelName
from cortex.simulator.trace import Ask
from shared.settings import SettingsError, SettingsModel, load_settings


class Users(SettingsModel):
    """`[[users]]`: one kind of session: the mean number of requests, the median seconds of work per request, and the
    mean seconds from one answer to the next request."""

    model: ModelName
    requests: float = Field(default=5, ge=1, le=10_000)
    serve_secs: float = Field(default=5, gt=0)
    think_secs: float = Field(default=20, ge=0)
    weight: float | None = Field(default=None, gt=0)


class Workload(SettingsModel):
    """The file. The n-th kind of session starts 1 / n ** `skew` times as often as the first (Zipf's law), unless it
    has a `weight`. Waves and lulls both last `wave_secs` on average; in waves, sessions start `wave_factor` times as
    often as in lulls, at the same overall rate. `spread` is the standard deviation of the logarithm of a session's
    service times."""

    hours: float = Field(default=2, gt=0, le=10_000)
    sessions_per_hour: float = Field(default=100, gt=0)
    skew: float = Field(default=1.0, ge=0)
    wave_factor: float = Field(default=3, ge=1)
    wave_secs: float = Field(default=600, gt=0)
    spread: float = Field(default=0.6, ge=0)
    users: tuple[Users, ...] = Field(min_length=1)


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
    weights = [users.weight or 1 / rank**workload.skew for rank, users in enumerate(workload.users, start=1)]
    cumulative = list(accumulate(weights))
    asks: list[Ask] = []
    for begin in _session_times(workload, load, chance):
        (users,) = chance.choices(workload.users, cum_weights=cumulative)
        asks += _session(users, catalogue.resolve(users.model), begin, workload, chance)
    asks.sort()
    return asks


def _session_times(workload: Workload, load: float, chance: random.Random) -> Iterator[float]:
    """A Poisson process whose rate changes between waves and lulls."""
    end = workload.hours * 3600
    lull = 2 / (1 + workload.wave_factor) * workload.sessions_per_hour * load / 3600
    now, wave = 0.0, False
    turns_at = chance.expovariate(1 / workload.wave_secs)
    while now < end:
        pause = chance.expovariate(lull * (workload.wave_factor if wave else 1))
        if now + pause >= turns_at:  # memoryless: redraw at the new rate
            now, wave = turns_at, not wave
            turns_at = now + chance.expovariate(1 / workload.wave_secs)
            continue
        now += pause
        if now < end:
            yield now


def _session(users: Users, model: str, begin: float, workload: Workload, chance: random.Random) -> Iterator[Ask]:
    at = begin
    while at < workload.hours * 3600:
        secs = chance.lognormvariate(math.log(users.serve_secs), workload.spread)
        yield Ask(round(at, 3), model, round(secs, 3))
        if chance.random() < 1 / users.requests:
            return
        at += secs + (chance.expovariate(1 / users.think_secs) if users.think_secs else 0.0)
