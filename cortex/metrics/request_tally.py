"""What one worker's requests are counted in: plain numbers for each model and neuron. No I/O.

A new metric of the request path needs its count here and a field of `cortex.metrics.counters.Series`, which is how it
travels to the control process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Set as AbstractSet

from cortex.accounts.caller import PEOPLE, label_of
from cortex.metrics.counters import (
    FIRST_BYTE_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    CallerSeries,
    Counters,
    Histogram,
    Series,
)
from cortex.upstream.usage import Usage


class _Counts:
    """Of one model on one neuron."""

    __slots__ = (
        "answers",
        "cached",
        "completion",
        "durations",
        "errors",
        "failovers",
        "first_byte_secs",
        "first_bytes",
        "first_event_secs",
        "first_events",
        "per_token",
        "per_token_secs",
        "prompt",
        "received",
        "secs",
        "sent",
        "statuses",
        "waited_secs",
        "waits",
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
        self.first_events = [0] * (len(FIRST_BYTE_BUCKETS) + 1)
        self.first_event_secs = 0.0
        self.per_token = [0] * (len(TOKEN_BUCKETS) + 1)
        self.per_token_secs = 0.0
        self.waits = [0] * (len(REQUEST_BUCKETS) + 1)
        self.waited_secs = 0.0
        self.failovers: dict[str, int] = {}
        self.received = self.sent = 0  # bytes of bodies

    def series(self) -> Series:
        tokens = _by_kind(self.answers, self.prompt, self.completion, self.cached)
        return Series(
            self.statuses.copy(),
            self.errors.copy(),
            tokens,
            Histogram(self.durations.copy(), self.secs),
            Histogram(self.first_bytes.copy(), self.first_byte_secs),
            Histogram(self.first_events.copy(), self.first_event_secs),
            Histogram(self.per_token.copy(), self.per_token_secs),
            Histogram(self.waits.copy(), self.waited_secs),
            self.failovers.copy(),
            {"request": self.received, "answer": self.sent} if self.received or self.sent else {},
        )


class _CallerCounts:
    """Of one API key for one model."""

    __slots__ = ("answers", "cached", "completion", "prompt", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.answers = 0
        self.prompt = self.completion = self.cached = 0

    def series(self) -> CallerSeries:
        return CallerSeries(self.statuses.copy(), _by_kind(self.answers, self.prompt, self.completion, self.cached))


class RequestTally:
    """Everything counted since the worker began. Numbers only grow, but those of a key that is gone end. Callers bound
    the labels: models and neurons that exist, and UNKNOWN."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, _Counts]] = {}  # by model and neuron
        self._callers: dict[str, dict[str, _CallerCounts]] = {}  # by name of the key and model
        self._dropped_usage_records = 0

    def request(
        self,
        model: str,
        node: str,
        status: int,
        secs: float,
        first_byte_secs: float | None,
        *,
        waited_secs: float = 0.0,
    ) -> None:
        """Counts a request that was answered, or whose client disconnected.

        Args:
            status: the HTTP status of the answer.
            secs: duration of the whole request.
            first_byte_secs: from the arrival of the request to the head of its answer; None if no engine answered.
            waited_secs: of these, until there was an engine that could take it; 0 if it did not wait.
        """
        counts = self._of(model, node)
        counts.statuses[status] = counts.statuses.get(status, 0) + 1
        counts.durations[bisect_left(REQUEST_BUCKETS, secs)] += 1
        counts.secs += secs
        if first_byte_secs is not None:
            counts.first_bytes[bisect_left(FIRST_BYTE_BUCKETS, first_byte_secs)] += 1
            counts.first_byte_secs += first_byte_secs
        if waited_secs:
            counts.waits[bisect_left(REQUEST_BUCKETS, waited_secs)] += 1
            counts.waited_secs += waited_secs

    def answer(self, model: str, node: str, received: int, sent: int) -> None:
        """Counts the bytes of a request's body and of its answer's, which an engine made."""
        counts = self._of(model, node)
        counts.received += received
        counts.sent += sent

    def stream(self, model: str, node: str, first_event_secs: float, later_secs: float, later_tokens: int) -> None:
        """Counts a stream of events: from the arrival of its request to the first one, and how long the tokens after
        that took; 0 tokens if that is not known."""
        counts = self._of(model, node)
        counts.first_events[bisect_left(FIRST_BYTE_BUCKETS, first_event_secs)] += 1
        counts.first_event_secs += first_event_secs
        if later_tokens > 0:
            secs = later_secs / later_tokens
            counts.per_token[bisect_left(TOKEN_BUCKETS, secs)] += 1
            counts.per_token_secs += secs

    def failover(self, model: str, node: str, kind: str) -> None:
        """Counts an engine that a request was sent to and that did not answer it."""
        failovers = self._of(model, node).failovers
        failovers[kind] = failovers.get(kind, 0) + 1

    def caller(self, name: str, model: str, status: int, usage: Usage | None) -> None:
        """Counts a request for the API key, or the person, of this name."""
        models = self._callers.get(name)
        if models is None:
            models = self._callers.setdefault(label_of(name), {})
        counts = models.get(model)
        if counts is None:
            counts = models[model] = _CallerCounts()
        counts.statuses[status] = counts.statuses.get(status, 0) + 1
        if usage is not None:
            counts.answers += 1
            counts.prompt += usage.prompt
            counts.completion += usage.completion
            counts.cached += usage.cached

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

    def keep_callers(self, names: AbstractSet[str]) -> None:
        """Forgets the API keys that have other names: they are gone."""
        for name in self._callers.keys() - names - {PEOPLE}:
            del self._callers[name]

    def collect(self, *, callers: bool = False) -> Counters:
        """The counts up to now, which change no more. `callers`: also those by API key, which may be thousands."""
        series = {
            model: {node: counts.series() for node, counts in nodes.items()} for model, nodes in self._models.items()
        }
        by_key: dict[str, dict[str, CallerSeries]] = {}
        if callers:
            for name, models in self._callers.items():
                by_key[name] = {model: counts.series() for model, counts in models.items()}
        return Counters(series, self._dropped_usage_records, by_key)

    def _of(self, model: str, node: str) -> _Counts:
        nodes = self._models.get(model)
        counts = None if nodes is None else nodes.get(node)
        if counts is None:
            counts = self._models.setdefault(model, {})[node] = _Counts()
        return counts


def _by_kind(answers: int, prompt: int, completion: int, cached: int) -> dict[str, int]:
    """Tokens by kind; of `answers` that told them."""
    tokens: dict[str, int] = {}
    if answers:
        tokens["prompt"] = prompt
        tokens["completion"] = completion
    if cached:
        tokens["cached"] = cached
    return tokens
