"""What the request path counts: plain numbers for each model and neuron, cheap to add to and to add up.

Each worker process has a tally and sends it, whole, to the control process, which renders the sum for Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar

import msgspec

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds in seconds; one more bucket holds what is above the last."""

Key: TypeAlias = tuple[str, str]
"""Model and neuron."""

_Label = TypeVar("_Label", int, str)


class Histogram(msgspec.Struct):
    """How often which duration was seen. `counts` has one number for each bucket, not added up."""

    counts: list[int]
    secs: float = 0.0

    @classmethod
    def of(cls, buckets: tuple[float, ...]) -> Histogram:
        """An empty one. `buckets` are its upper bounds in seconds."""
        return cls([0] * (len(buckets) + 1))

    def observe(self, buckets: tuple[float, ...], secs: float) -> None:
        """Counts one duration. `buckets` are those it was made with, which it need not carry about."""
        self.counts[bisect_left(buckets, secs)] += 1
        self.secs += secs

    def add(self, other: Histogram) -> None:
        """Adds another of the same buckets."""
        self.counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        self.secs += other.secs


class Series(msgspec.Struct):
    """The counts of one model on one neuron."""

    statuses: dict[int, int] = {}
    errors: dict[str, int] = {}
    tokens: dict[str, int] = {}  # by kind: prompt, completion
    duration: Histogram = msgspec.field(default_factory=lambda: Histogram.of(REQUEST_BUCKETS))
    first_byte: Histogram = msgspec.field(default_factory=lambda: Histogram.of(FIRST_BYTE_BUCKETS))

    def add(self, other: Series) -> None:
        """Adds the counts of another."""
        _add(self.statuses, other.statuses)
        _add(self.errors, other.errors)
        _add(self.tokens, other.tokens)
        self.duration.add(other.duration)
        self.first_byte.add(other.first_byte)


class Counters(msgspec.Struct):
    """Everything that was counted since the process began, as a message to another process. It only grows. Its labels
    are bounded by whoever counts: models and neurons that exist, and one word for all others."""

    series: dict[str, dict[str, Series]] = {}  # by model and neuron

    def request(self, model: str, node: str, status: int, secs: float, first_byte_secs: float | None) -> None:
        """One request that was answered, or left by its client.

        Args:
            status: the HTTP status of the answer.
            secs: the whole request took so long.
            first_byte_secs: from the request's arrival to its answer's head; None when no engine answered.
        """
        series = self._of(model, node)
        series.statuses[status] = series.statuses.get(status, 0) + 1
        series.duration.observe(REQUEST_BUCKETS, secs)
        if first_byte_secs is not None:
            series.first_byte.observe(FIRST_BYTE_BUCKETS, first_byte_secs)

    def error(self, model: str, node: str, code: str) -> None:
        """One request that ended in an error of ours."""
        errors = self._of(model, node).errors
        errors[code] = errors.get(code, 0) + 1

    def tokens(self, model: str, node: str, prompt: int, completion: int) -> None:
        """What an engine reported for one request."""
        tokens = self._of(model, node).tokens
        tokens["prompt"] = tokens.get("prompt", 0) + prompt
        tokens["completion"] = tokens.get("completion", 0) + completion

    def items(self) -> Iterator[tuple[Key, Series]]:
        """Each series with its model and neuron."""
        for model, nodes in self.series.items():
            for node, series in nodes.items():
                yield (model, node), series

    def add(self, other: Counters) -> None:
        """Adds the counts of another, and shares nothing with it.

        Raises:
            ValueError: it came from a program with other buckets.
        """
        for key, series in other.items():
            self._of(*key).add(series)

    def _of(self, model: str, node: str) -> Series:
        try:
            return self.series[model][node]
        except KeyError:
            return self.series.setdefault(model, {}).setdefault(node, Series())


def merged(tallies: Iterable[Counters]) -> Counters:
    """The sum of all, which shares nothing with them."""
    total = Counters()
    for tally in tallies:
        total.add(tally)
    return total


def _add(total: dict[_Label, int], more: Mapping[_Label, int]) -> None:
    for label, count in more.items():
        total[label] = total.get(label, 0) + count
