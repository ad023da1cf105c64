"""cortex's metrics for Prometheus, rendered at each scrape: names, labels and help texts."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from cortex.accounts.fairness.device_time import Charge
from cortex.accounts.usage.journal_file import USAGE_DIRECTORY, total_bytes
from cortex.fleet.poller import PollCounts
from cortex.fleet.state import Fleet
from cortex.metrics.counters import (
    FIRST_BYTE_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    Counters,
    Histogram,
    merged,
)
from cortex.metrics.energy import EnergyTotals
from cortex.routing.replica import LoadPhase, ModelOnNode, ReplicaKey

COLD_START_BUCKETS = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)
_LABELS = ("model", "node")


class Metrics:
    """The registry of one control app. Labels are bounded: only models and neurons that exist.

    Workers count requests; the control process counts loads and evictions here. `polls`: of each neuron, by name.
    """

    def __init__(
        self,
        fleet: Fleet,
        in_flight: Callable[[], Mapping[ReplicaKey, int]],
        counters: Callable[[], Iterable[Counters]],
        *,
        waiting: Callable[[], Mapping[str, int]] = dict,
        charged: Callable[[], Mapping[Charge, float]] = dict,
        state_dir: Path | None = None,
    ) -> None:
        """`waiting`: how many requests wait, by the name of their model. `charged`: as of `DeviceTime`."""
        self.polls: Callable[[], Mapping[str, PollCounts]] = dict
        self._loads = _Loads()
        self._failed_scrapes: Counter[ModelOnNode] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(_Requests(counters))
        self._registry.register(self._loads)
        self._registry.register(_Fairness(charged))
        self._registry.register(_Polls(self))
        self._registry.register(_FleetGauges(fleet, in_flight, waiting))
        self._registry.register(_EngineScrapes(self._failed_scrapes))
        self._disk = _StateDisk(state_dir)
        self._registry.register(self._disk)
        self.energy = EnergyTotals()
        self._registry.register(_Energy(self.energy))

    def cold_start(self, model: str, node: str, secs: float, phases: Sequence[LoadPhase] = ()) -> None:
        """Counts a model that was loaded for a request."""
        self._loads.succeeded(model, node, secs, phases)

    def load_failed(self, model: str, node: str) -> None:
        """Counts a load that failed."""
        self._loads.failed[model, node] += 1

    def displaced(self, key: ReplicaKey, reason: str) -> None:
        """Counts an engine that was unloaded or put to sleep."""
        self._loads.displaced[key.model_id, key.node, reason] += 1

    def engine_scrape_failed(self, model: str, node: str) -> None:
        """Counts an engine whose metrics could not be read."""
        self._failed_scrapes[model, node] += 1

    def measure_disk(self) -> None:
        """Looks at the state directory, for the next scrape. Blocks."""
        self._disk.measure()

    def exposition(self) -> bytes:
        """The body of a scrape."""
        return generate_latest(self._registry)


class _Requests(Collector):
    """Counted by the workers."""

    def __init__(self, counters: Callable[[], Iterable[Counters]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("cortex_requests", "Requests answered", labels=[*_LABELS, "status"])
        errors = CounterMetricFamily(
            "cortex_request_errors", "Requests that ended in an error", labels=[*_LABELS, "code"]
        )
        tokens = CounterMetricFamily("cortex_tokens", "Tokens as the engines report them", labels=[*_LABELS, "kind"])
        duration = _family("cortex_request_duration_seconds", "Whole requests")
        first_byte = _family("cortex_time_to_first_byte_seconds", "From a request's arrival to its answer's head")
        first_event = _family("cortex_time_to_first_token_seconds", "From the arrival to a stream's first event")
        per_token = _family("cortex_time_per_token_seconds", "Mean time between the tokens of a stream")
        waits = _family("cortex_request_wait_seconds", "Time that requests waited for an engine")
        failovers = CounterMetricFamily(
            "cortex_failovers", "Engines that did not answer a request", labels=[*_LABELS, "kind"]
        )
        relayed = CounterMetricFamily("cortex_relayed_bytes", "Bodies passed on", labels=[*_LABELS, "kind"])
        dropped = CounterMetricFamily("cortex_usage_records_dropped", "Records of usage that could not be written")
        total = merged(self._counters())
        dropped.add_metric([], total.dropped_usage_records)
        for key, series in total.items():
            for status, count in series.statuses.items():
                requests.add_metric([*key, str(status)], count)
            for code, count in series.errors.items():
                errors.add_metric([*key, code], count)
            for kind, count in series.tokens.items():
                tokens.add_metric([*key, kind], count)
            _add(duration, key, REQUEST_BUCKETS, series.duration)
            for kind, count in series.failovers.items():
                failovers.add_metric([*key, kind], count)
            for kind, count in series.body_bytes.items():
                relayed.add_metric([*key, kind], count)
            _add(first_byte, key, FIRST_BYTE_BUCKETS, series.first_byte)
            _add(first_event, key, FIRST_BYTE_BUCKETS, series.first_event)
            _add(per_token, key, TOKEN_BUCKETS, series.per_token)
            _add(waits, key, REQUEST_BUCKETS, series.waits)
        yield from (requests, errors, tokens, duration, first_byte, first_event, per_token, waits, failovers, relayed)
        yield from (dropped, *_by_caller(total))


def _by_caller(total: Counters) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "cortex_caller_requests", "Requests answered, by API key", labels=["key", "model", "status"]
    )
    tokens = CounterMetricFamily("cortex_caller_tokens", "Tokens by API key", labels=["key", "model", "kind"])
    for caller, models in total.callers.items():
        for model, counts in models.items():
            for status, count in counts.statuses.items():
                requests.add_metric([caller, model, str(status)], count)
            for kind, count in counts.tokens.items():
                tokens.add_metric([caller, model, kind], count)
    yield from (requests, tokens)


class _Loads(Collector):
    """Loads and their opposite, counted by the control process."""

    def __init__(self) -> None:
        self._cold_starts: dict[ModelOnNode, Histogram] = {}
        self._phases: dict[tuple[str, str, str], list[float]] = {}  # by model, node and phase
        self.failed: Counter[ModelOnNode] = Counter()
        self.displaced: Counter[tuple[str, str, str]] = Counter()  # by model, node and reason

    def succeeded(self, model: str, node: str, secs: float, phases: Sequence[LoadPhase]) -> None:
        started = self._cold_starts.setdefault((model, node), Histogram.of(COLD_START_BUCKETS))
        started.observe(COLD_START_BUCKETS, secs)
        for phase in phases:
            count_and_secs = self._phases.setdefault((model, node, phase.name), [0, 0.0])
            count_and_secs[0] += 1
            count_and_secs[1] += phase.secs

    def collect(self) -> Iterator[Metric]:
        loads = CounterMetricFamily("cortex_cold_starts", "Models loaded on request", labels=_LABELS)
        failures = CounterMetricFamily("cortex_load_failures", "Loads that failed", labels=_LABELS)
        took = _family("cortex_cold_start_seconds", "Loads on request")
        phases = SummaryMetricFamily(
            "cortex_cold_start_phase_seconds", "Phases of loads on request", labels=[*_LABELS, "phase"]
        )
        displaced = CounterMetricFamily(
            "cortex_displacements", "Engines unloaded or put to sleep", labels=[*_LABELS, "reason"]
        )
        for key, failed in self.failed.items():
            failures.add_metric(key, failed)
        for key, histogram in self._cold_starts.items():
            loads.add_metric(key, sum(histogram.counts))
            _add(took, key, COLD_START_BUCKETS, histogram)
        for place, (count, secs) in self._phases.items():
            phases.add_metric(place, int(count), secs)
        for place, times in self.displaced.items():
            displaced.add_metric(place, times)
        yield from (loads, failures, took, phases, displaced)


class _Fairness(Collector):
    """Counted by the control process."""

    def __init__(self, charged: Callable[[], Mapping[Charge, float]]) -> None:
        self._charged = charged

    def collect(self) -> Iterator[Metric]:
        seconds = CounterMetricFamily(
            "cortex_caller_device_seconds", "GPU time that callers are charged with", labels=["key", "kind"]
        )
        for charge, secs in self._charged().items():
            seconds.add_metric(charge, secs)
        yield seconds


class _Polls(Collector):
    """Counted by the neurons' pollers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        took = SummaryMetricFamily("cortex_node_poll_seconds", "Polls that the neuron answered", labels=["node"])
        failed = CounterMetricFamily("cortex_node_poll_failures", "Polls that failed", labels=["node"])
        for node, counts in self._metrics.polls().items():
            took.add_metric([node], counts.answered, counts.answer_secs)
            failed.add_metric([node], counts.failed)
        yield from (took, failed)


class _EngineScrapes(Collector):
    """Counted by `/metrics/engines`."""

    def __init__(self, failed: Mapping[ModelOnNode, int]) -> None:
        self._failed = failed

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "cortex_engine_scrape_failures", "Times that an engine's metrics could not be read", labels=_LABELS
        )
        for key, failed in self._failed.items():
            failures.add_metric(key, failed)
        yield failures


class _StateDisk(Collector):
    """The disk that cortex writes to, as it was last measured."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._measured: dict[str, tuple[str, int]] = {}  # help text and bytes, by name

    def measure(self) -> None:
        if self._directory is None:
            return
        measured: dict[str, tuple[str, int]] = {}
        with contextlib.suppress(OSError):  # the directory is made when something is first kept
            free = shutil.disk_usage(self._directory).free
            measured["cortex_state_disk_free_bytes"] = "Free space where cortex keeps its state", free
        waiting = 0
        with contextlib.suppress(OSError):
            waiting = total_bytes(self._directory / USAGE_DIRECTORY)
        measured["cortex_usage_journal_bytes"] = "Usage that waits for the database", waiting
        self._measured = measured

    def collect(self) -> Iterator[Metric]:
        for name, (text, size) in self._measured.items():
            yield GaugeMetricFamily(name, text, size)


class _Energy(Collector):
    """Counted by the control process."""

    def __init__(self, totals: EnergyTotals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        energy = CounterMetricFamily(
            "cortex_energy_wh", "Energy of the GPUs by what it was used for", labels=["model", "kind"]
        )
        for key, wh in list(self._totals.wh.items()):
            energy.add_metric(key, wh)
        yield energy


class _FleetGauges(Collector):
    """Gauges read from the fleet and from the workers."""

    def __init__(
        self,
        fleet: Fleet,
        in_flight: Callable[[], Mapping[ReplicaKey, int]],
        waiting: Callable[[], Mapping[str, int]],
    ) -> None:
        self._fleet = fleet
        self._in_flight = in_flight
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        healthy = GaugeMetricFamily("cortex_node_healthy", "1 when the neuron answers", labels=["node"])
        for node in self._fleet.snapshot().nodes.values():
            healthy.add_metric([node.name], float(node.healthy))
        working = GaugeMetricFamily("cortex_requests_in_flight", "Requests at engines", labels=_LABELS)
        engines = GaugeMetricFamily(
            "cortex_instance_requests_in_flight", "Requests at each engine", labels=[*_LABELS, "engine"]
        )
        total: Counter[ModelOnNode] = Counter()
        adapters = self._fleet.snapshot().catalogue.adapters  # their requests count for the base as well
        for key, count in self._in_flight().items():
            if key.model_id in adapters:
                continue
            total[key.model_id, key.node] += count
            if key.instance:
                engines.add_metric(key, count)
        for place, count in total.items():
            working.add_metric(place, count)
        waiting = GaugeMetricFamily("cortex_requests_waiting", "Requests that wait for a model", labels=["model"])
        for model, count in self._waiting().items():
            waiting.add_metric([model], count)
        yield from (healthy, working, engines, waiting)


def _family(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=_LABELS)


def _add(family: HistogramMetricFamily, key: ModelOnNode, buckets: tuple[float, ...], histogram: Histogram) -> None:
    """Adds the samples of one series, unless it is empty."""
    if not any(histogram.counts):
        return
    names = [*(str(float(bound)) for bound in buckets), "+Inf"]
    family.add_metric(key, list(zip(names, accumulate(histogram.counts), strict=True)), histogram.secs)
