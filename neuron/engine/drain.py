"""Whether an engine that is to stop still has requests, and how that is known."""

from __future__ import annotations

import asyncio
import os
import time

from neuron.engine import session
from neuron.engine.connections import connections_to, is_busy
from neuron.engine.engine import Engine
from neuron.harness.activity import RequestCounts
from shared.tasks import timeout

_FIGURES_SECS = 1.0  # an answer from a page of figures may take this long, before the connections are looked at instead
_CPU_SAMPLE_SECS = 1.0
_COMPUTING_SHARE = 0.05  # of one core; health checks and timers take less
_TICKS = os.sysconf("SC_CLK_TCK")


class DrainWatch:
    """Asks one engine again and again. Its own figures count if it tells any, else its connections; an engine about
    which neither tells anything counts as idle."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cpu_time = _CpuTime(engine)

    async def waits_for(self) -> str | None:
        """The requests that the engine still has, in words; None when it seems to have none. Takes at most a second or
        two, also with an engine that hangs."""
        # One that has told none so far is not asked: its answer may take as long as a check.
        sample = None if self._engine.health.sample is None else await self._figures()
        if sample is not None:
            count = sample.running + sample.waiting
            return f"{_counted(count, 'request')} to finish" if count else None
        found = await asyncio.to_thread(connections_to, self._engine.port) or []
        if not any(is_busy(each) for each in found):
            return None
        idle_secs = await self._cpu_time.idle_secs()
        count = sum(is_busy(each, idle_secs=idle_secs) for each in found)
        if not count:
            return None
        return f"{_counted(count, 'connection')} that may have a request (the engine does not tell its requests)"

    async def _figures(self) -> RequestCounts | None:
        try:
            async with timeout(_FIGURES_SECS):
                return await self._engine.health.take_sample()
        except asyncio.TimeoutError:
            return None


class _CpuTime:
    """How long an engine's processes have used next to no CPU time, since the first question."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._serves: bool | None = None
        self._ticks = 0
        self._sampled_at = float("-inf")
        self._computed_at = 0.0

    async def idle_secs(self) -> float:
        """0 when it computes, and when it is not known which processes serve."""
        if self._serves is None:  # an engine may be a client of processes elsewhere, in a container for example
            self._serves = await self._engine.owns_port()
        now = time.monotonic()
        passed = now - self._sampled_at
        if self._serves and passed >= _CPU_SAMPLE_SECS:
            ticks = await asyncio.to_thread(self._used_ticks)
            used = ticks - self._ticks
            if used < 0 or used > _COMPUTING_SHARE * passed * _TICKS or not self._computed_at:
                self._computed_at = now
            self._ticks, self._sampled_at = ticks, now
        return self._sampled_at - self._computed_at if self._serves else 0.0

    def _used_ticks(self) -> int:
        return sum(process.cpu_ticks for process in session.members(self._engine.process.leader))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
