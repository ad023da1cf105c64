"""cortex's metrics for Prometheus, rendered at each scrape: names, labels and help texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

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
    ) -> None:
        self._cold_starts: dict[ModelOnNode, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_Requests(counters))
        self._registry.register(_ColdStarts(self._cold_starts))
        self._registry.register(_FleetGauges(fleet, in_flight))
        self.energy = EnergyTotals()
        self._registry.register(_Energy(self.energy))

    def cold_start(self, model: str, node: str, secs: float) -> None:
        """Counts a model that was loaded for a request."""
        started = self._cold_starts.setdefault((model, node), Histogram.of(COLD_START_BUCKETS))
        started.observe(COLD_START_BUCKETS, secs)

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

    def __init__(self, cold_starts: Mapping[ModelOnNode, Histogram]) -> None:
        self._cold_starts = cold_starts

    def collect(self) -> Iterator[Metric]:
        loads = CounterMetricFamily("cortex_cold_starts", "Models loaded on request", labels=_LABELS)
        took = _family("cortex_cold_start_seconds", "Loads on request")
        for key, histogram in self._cold_starts.items():
            loads.add_metric(key, sum(histogram.counts))
            _add(took, key, COLD_START_BUCKETS, histogram)
        yield from (loads, took)


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

    def __init__(self, fleet: Fleet, in_flight: Callable[[], Mapping[ReplicaKey, int]]) -> None:
        self._fleet = fleet
        self._in_flight = in_flight

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
        yield from (healthy, working, engines)


def _family(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=_LABELS)


def _add(family: HistogramMetricFamily, key: ModelOnNode, buckets: tuple[float, ...], histogram: Histogram) -> None:
    """Adds the samples of one series, unless it is empty."""
    if not any(histogram.counts):
        return
    names = [*(str(float(bound)) for bound in buckets), "+Inf"]
    family.add_metric(key, list(zip(names, accumulate(histogram.counts), strict=True)), histogram.secs)
