"""What cortex counts, for Prometheus. One registry for each app, none global."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex.fleet import Fleet
from cortex.in_flight import InFlight

_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COLD_START_BUCKETS = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)


class Metrics:
    """The names and labels of the contract. Labels take only models and neurons that exist, so they stay bounded."""

    def __init__(self, fleet: Fleet, in_flight: InFlight) -> None:
        self.registry = CollectorRegistry()
        labels = ["model", "node"]
        self._requests = self._counter("cortex_requests", "Requests answered", [*labels, "status"])
        self._errors = self._counter("cortex_request_errors", "Requests that ended in an error", [*labels, "code"])
        self._cold_starts = self._counter("cortex_cold_starts", "Models loaded on request", labels)
        self._tokens = self._counter("cortex_tokens", "Tokens as the engines report them", [*labels, "kind"])
        self._duration = self._histogram("cortex_request_duration_seconds", "Whole requests", _REQUEST_BUCKETS)
        self._first_byte = self._histogram(
            "cortex_time_to_first_byte_seconds", "From a request's arrival to its answer's head", _FIRST_BYTE_BUCKETS
        )
        self._cold_start = self._histogram("cortex_cold_start_seconds", "Loads on request", _COLD_START_BUCKETS)
        self.registry.register(_FleetGauges(fleet, in_flight))

    def request(self, model: str, node: str, status: int, duration_secs: float) -> None:
        self._requests.labels(model, node, str(status)).inc()
        self._duration.labels(model, node).observe(duration_secs)

    def error(self, model: str, node: str, code: str) -> None:
        self._errors.labels(model, node, code).inc()

    def first_byte(self, model: str, node: str, secs: float) -> None:
        self._first_byte.labels(model, node).observe(secs)

    def cold_start(self, model: str, node: str, secs: float) -> None:
        self._cold_starts.labels(model, node).inc()
        self._cold_start.labels(model, node).observe(secs)

    def tokens(self, model: str, node: str, *, prompt: int, completion: int) -> None:
        self._tokens.labels(model, node, "prompt").inc(prompt)
        self._tokens.labels(model, node, "completion").inc(completion)

    def exposition(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model", "node"], buckets=buckets, registry=self.registry)


class _FleetGauges(Collector):
    """Gauges read from the fleet at the time of the scrape."""

    def __init__(self, fleet: Fleet, in_flight: InFlight) -> None:
        self._fleet = fleet
        self._in_flight = in_flight

    def collect(self) -> Iterable[Metric]:
        healthy = GaugeMetricFamily("cortex_node_healthy", "1 when the neuron answers", labels=["node"])
        for node in self._fleet.snapshot().nodes.values():
            healthy.add_metric([node.name], float(node.healthy))
        yield healthy
        working = GaugeMetricFamily("cortex_requests_in_flight", "Requests at engines", labels=["model", "node"])
        for (model, name), count in self._in_flight.all().items():
            working.add_metric([model, name], count)
        yield working
