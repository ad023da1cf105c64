"""What workers have counted, for each model and neuron. No I/O.

Each worker counts its requests (`cortex.metrics.request_tally`) and sends the counts to the control process, which
renders their sum for Prometheus (`cortex.metrics.exporter`). A new metric of the request path needs a field here, its
sum in `add`, and a family there. Not compiled: mypyc does not know msgspec's structs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias, TypeVar

import msgspec

from cortex.routing.replica import ModelOnNode

Buckets: TypeAlias = tuple[float, ...]  # of any length: compiled code takes one of fixed length apart
REQUEST_BUCKETS: Buckets = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
FIRST_BYTE_BUCKETS: Buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BUCKETS: Buckets = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds in seconds; one more bucket holds what is above the last."""

UNKNOWN: Final = "unknown"
"""The label for a model or a neuron that does not exist."""

_Label = TypeVar("_Label", int, str)


class Histogram(msgspec.Struct):
    """A histogram of durations. `counts` has one number for each bucket, not cumulative; `secs` is the sum."""

    counts: list[int]
    secs: float = 0.0

    @classmethod
    def of(cls, buckets: tuple[float, ...]) -> Histogram:
        """An empty histogram. `buckets` are its upper bounds in seconds."""
        return cls([0] * (len(buckets) + 1))

    def observe(self, buckets: tuple[float, ...], secs: float) -> None:
        """Counts one duration. `buckets` must be those that it was created with."""
        self.counts[bisect_left(buckets, secs)] += 1
        self.secs += secs

    def add(self, other: Histogram) -> None:
        """Adds another histogram with the same buckets."""
        self.counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        self.secs += other.secs


class Series(msgspec.Struct):
    """The counts of one model on one neuron. `add` must sum every field, or the counts of other workers are lost."""

    statuses: dict[int, int] = {}
    errors: dict[str, int] = {}
    tokens: dict[str, int] = {}  # by kind: prompt, completion, cached
    duration: Histogram = msgspec.field(default_factory=lambda: Histogram.of(REQUEST_BUCKETS))
    first_byte: Histogram = msgspec.field(default_factory=lambda: Histogram.of(FIRST_BYTE_BUCKETS))
    first_event: Histogram = msgspec.field(default_factory=lambda: Histogram.of(FIRST_BYTE_BUCKETS))  # of streams
    per_token: Histogram = msgspec.field(default_factory=lambda: Histogram.of(TOKEN_BUCKETS))  # of streams, after it
    waits: Histogram = msgspec.field(default_factory=lambda: Histogram.of(REQUEST_BUCKETS))  # without those of no time
    failovers: dict[str, int] = {}  # by kind of failure
    body_bytes: dict[str, int] = {}  # by kind: request, answer

    def add(self, other: Series) -> None:
        """Adds the counts of another."""
        _add(self.statuses, other.statuses)
        _add(self.errors, other.errors)
        _add(self.tokens, other.tokens)
        self.duration.add(other.duration)
        self.first_byte.add(other.first_byte)
        self.first_event.add(other.first_event)
        self.per_token.add(other.per_token)
        self.waits.add(other.waits)
        _add(self.failovers, other.failovers)
        _add(self.body_bytes, other.body_bytes)


class CallerSeries(msgspec.Struct):
    """The counts of one API key for one model. `add` must sum every field."""

    statuses: dict[int, int] = {}
    tokens: dict[str, int] = {}  # by kind, as of `Series`

    def add(self, other: CallerSeries) -> None:
        """Adds the counts of another."""
        _add(self.statuses, other.statuses)
        _add(self.tokens, other.tokens)


class Counters(msgspec.Struct):
    """Everything counted since a process began, also as a message between processes."""

    series: dict[str, dict[str, Series]] = {}  # by model and neuron
    dropped_usage_records: int = 0
    callers: dict[str, dict[str, CallerSeries]] = {}  # by name of the key and model

    def items(self) -> Iterator[tuple[ModelOnNode, Series]]:
        """Each series with its model and neuron."""
        for model, nodes in self.series.items():
            for node, series in nodes.items():
                yield (model, node), series

    def add(self, other: Counters) -> None:
        """Adds the counts of another, without sharing objects.

        Raises:
            ValueError: the other has other buckets (another version of cortex).
        """
        for key, series in other.items():
            self._of(*key).add(series)
        self.dropped_usage_records += other.dropped_usage_records
        for caller, models in other.callers.items():
            mine = self.callers.setdefault(caller, {})
            for model, counts in models.items():
                mine.setdefault(model, CallerSeries()).add(counts)

    def _of(self, model: str, node: str) -> Series:
        try:
            return self.series[model][node]
        except KeyError:
            return self.series.setdefault(model, {}).setdefault(node, Series())


def merged(parts: Iterable[Counters]) -> Counters:
    """The sum, which shares no objects with its parts."""
    total = Counters()
    for part in parts:
        total.add(part)
    return total


def _add(total: dict[_Label, int], more: Mapping[_Label, int]) -> None:
    for label, count in more.items():
        total[label] = total.get(label, 0) + count
