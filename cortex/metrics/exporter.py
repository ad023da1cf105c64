"""cortex's metrics for Prometheus, rendered at each scrape: names, labels and help texts."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex.accounts.usage.journal_file import USAGE_DIRECTORY, total_bytes
from cortex.fleet.state import Fleet
from cortex.metrics.counters import FIRST_BYTE_BUCKETS, REQUEST_BUCKETS, Counters, Histogram, merged
from cortex.metrics.energy import EnergyTotals
from cortex.routing.replica import ModelOnNode, ReplicaKey

COLD_START_BUCKETS = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)
_LABELS = ("model", "node")


class Metrics:
    """The registry of one control app. Labels are bounded: only models and neurons that exist.

    Workers count requests; the control process counts cold starts here.
    """

    def __init__(
        self,
        fleet: Fleet,
        in_flight: Callable[[], Mapping[ReplicaKey, int]],
        counters: Callable[[], Iterable[Counters]],
        *,
        waiting: Callable[[], Mapping[str, int]] = dict,
        state_dir: Path | None = None,
    ) -> None:
        """`waiting`: how many requests wait, by the name of their model."""
        self._cold_starts: dict[ModelOnNode, Histogram] = {}
        self._failed_loads: Counter[ModelOnNode] = Counter()
        self._failed_scrapes: Counter[ModelOnNode] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(_Requests(counters))
        self._registry.register(_ColdStarts(self._cold_starts, self._failed_loads))
        self._registry.register(_FleetGauges(fleet, in_flight, waiting))
        self._registry.register(_EngineScrapes(self._failed_scrapes))
        self._disk = _StateDisk(state_dir)
        self._registry.register(self._disk)
        self.energy = EnergyTotals()
        self._registry.register(_Energy(self.energy))

    def cold_start(self, model: str, node: str, secs: float) -> None:
        """Counts a model that was loaded for a request."""
        started = self._cold_starts.setdefault((model, node), Histogram.of(COLD_START_BUCKETS))
        started.observe(COLD_START_BUCKETS, secs)

    def load_failed(self, model: str, node: str) -> None:
        """Counts a load that failed."""
        self._failed_loads[model, node] += 1

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
            _add(first_byte, key, FIRST_BYTE_BUCKETS, series.first_byte)
        yield from (requests, errors, tokens, duration, first_byte, dropped)


class _ColdStarts(Collector):
    """Counted by the control process."""

    def __init__(self, cold_starts: Mapping[ModelOnNode, Histogram], failed: Mapping[ModelOnNode, int]) -> None:
        self._cold_starts = cold_starts
        self._failed = failed

    def collect(self) -> Iterator[Metric]:
        loads = CounterMetricFamily("cortex_cold_starts", "Models loaded on request", labels=_LABELS)
        failures = CounterMetricFamily("cortex_load_failures", "Loads that failed", labels=_LABELS)
        took = _family("cortex_cold_start_seconds", "Loads on request")
        for key, failed in self._failed.items():
            failures.add_metric(key, failed)
        for key, histogram in self._cold_starts.items():
            loads.add_metric(key, sum(histogram.counts))
            _add(took, key, COLD_START_BUCKETS, histogram)
        yield from (loads, failures, took)


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
