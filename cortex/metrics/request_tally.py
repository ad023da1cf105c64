"""What one worker's requests are counted in: plain numbers for each model and neuron. No I/O.

A new metric of the request path needs its count here and a field of `cortex.metrics.counters.Series`, which is how it
travels to the control process.
"""

from __future__ import annotations

from bisect import bisect_left

from cortex.metrics.counters import FIRST_BYTE_BUCKETS, REQUEST_BUCKETS, Counters, Histogram, Series


class _Counts:
    """Of one model on one neuron."""

    __slots__ = (
        "answers",
        "cached",
        "completion",
        "durations",
        "errors",
        "first_byte_secs",
        "first_bytes",
        "prompt",
        "secs",
        "statuses",
    )

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.answers = 0  # that told their tokens
        self.prompt = self.completion = self.cached = 0
        self.durations = [0] * (len(REQUEST_BUCKETS) + 1)
        self.secs = 0.0
        self.first_bytes = [0] * (len(FIRST_BYTE_BUCKETS) + 1)
        self.first_byte_secs = 0.0

    def series(self) -> Series:
        tokens: dict[str, int] = {}
        if self.answers:
            tokens["prompt"] = self.prompt
            tokens["completion"] = self.completion
        if self.cached:
            tokens["cached"] = self.cached
        return Series(
            self.statuses.copy(),
            self.errors.copy(),
            tokens,
            Histogram(self.durations.copy(), self.secs),
            Histogram(self.first_bytes.copy(), self.first_byte_secs),
        )


class RequestTally:
    """Everything counted since the worker began. Numbers only grow. Callers bound the labels: models and neurons that
    exist, and UNKNOWN."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, _Counts]] = {}  # by model and neuron
        self._dropped_usage_records = 0

    def request(self, model: str, node: str, status: int, secs: float, first_byte_secs: float | None) -> None:
        """Counts a request that was answered, or whose client disconnected.

        Args:
            status: the HTTP status of the answer.
            secs: duration of the whole request.
            first_byte_secs: from the arrival of the request to the head of its answer; None if no engine answered.
        """
        counts = self._of(model, node)
        counts.statuses[status] = counts.statuses.get(status, 0) + 1
        counts.durations[bisect_left(REQUEST_BUCKETS, secs)] += 1
        counts.secs += secs
        if first_byte_secs is not None:
            counts.first_bytes[bisect_left(FIRST_BYTE_BUCKETS, first_byte_secs)] += 1
            counts.first_byte_secs += first_byte_secs

    def error(self, model: str, node: str, code: str) -> None:
        """Counts a request that ended in an error of cortex."""
        errors = self._of(model, node).errors
        errors[code] = errors.get(code, 0) + 1

    def tokens(self, model: str, node: str, prompt: int, completion: int, cached: int) -> None:
        """Counts the tokens that an engine reported for one request; `cached` of the prompt came from its cache."""
        counts = self._of(model, node)
        counts.answers += 1
        counts.prompt += prompt
        counts.completion += completion
        counts.cached += cached

    def usage_records_dropped(self, count: int) -> None:
        """Counts records of usage that could not be written and are lost."""
        self._dropped_usage_records += count

    def collect(self) -> Counters:
        """The counts up to now, which change no more."""
        series = {
            model: {node: counts.series() for node, counts in nodes.items()} for model, nodes in self._models.items()
        }
        return Counters(series, self._dropped_usage_records)

    def _of(self, model: str, node: str) -> _Counts:
        nodes = self._models.get(model)
        counts = None if nodes is None else nodes.get(node)
        if counts is None:
            counts = self._models.setdefault(model, {})[node] = _Counts()
        return counts
