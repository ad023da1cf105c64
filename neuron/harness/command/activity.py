"""Requests and progress of a described engine, from its Prometheus metrics. Pure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from neuron.config import ActivitySettings
from neuron.harness.activity import ActivityProbe, HangDetector, RequestCounts

LONGEST_GAP_SECS: Final = 30.0
"""Cap on the time that counts between two samples: neuron itself may have been stopped in between."""
_SAMPLE: Final = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class MetricsSample(RequestCounts):
    """`work`: the counters that rise only through progress, in the order of the description."""

    work: tuple[float, ...] = ()

    @property
    def marks(self) -> tuple[float, ...]:
        return (self.ended, *self.work)


class MetricsProbe(ActivityProbe[MetricsSample]):
    """Reads the metrics that the description names; values of several label sets are added."""

    def __init__(self, settings: ActivitySettings) -> None:
        self._settings = settings
        self.path = settings.path

    def sample_of(self, page: str) -> MetricsSample | None:
        settings, totals = self._settings, _totals(page)
        if settings.running not in totals:
            return None
        return MetricsSample(
            running=round(totals[settings.running]),
            waiting=round(totals.get(settings.waiting or "", 0.0)),
            ended=totals.get(settings.ended or "", 0.0),
            work=tuple(totals.get(name, 0.0) for name in settings.progress),
        )

    def hang_detector(self, grace_secs: float, prefill_grace_secs: float) -> HangDetector[MetricsSample]:
        """Which requests still read their prompt is not known: each may take `prefill_grace_secs`."""
        return StalledWork(prefill_grace_secs)


class StalledWork:
    """Detects that an engine hangs: it has running requests, and no counter of its work moves for `grace_secs`. Time
    without requests does not count. Without counters nothing is detected."""

    def __init__(self, grace_secs: float) -> None:
        self._grace_secs = grace_secs
        self._last: MetricsSample | None = None
        self._last_at = 0.0
        self._idle_secs = 0.0

    def observe(self, sample: MetricsSample | None, now: float) -> str | None:
        """See `HangDetector.observe`. A missing answer proves nothing."""
        if sample is None or not sample.work:
            return None
        last, passed = self._last, min(now - self._last_at, LONGEST_GAP_SECS)
        self._last, self._last_at = sample, now
        if last is None or sample.work != last.work:
            self._idle_secs = 0.0
        elif last.running and sample.running:
            self._idle_secs += passed
        if not sample.running or self._idle_secs < self._grace_secs:
            return None
        return f"hung: {sample.running} requests running and no work was counted for {self._idle_secs:.0f} s"


def _totals(page: str) -> Mapping[str, float]:
    totals: defaultdict[str, float] = defaultdict(float)
    for name, text in _SAMPLE.findall(page):
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value):
            totals[name] += value
    return dict(totals)
