"""Sends spans to an OTLP collector, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from cortex.config.settings import TracingSettings
from cortex.http.request import Request
from cortex.metrics.tracing.request_trace import RequestTrace

log = logging.getLogger(__name__)

QUEUE_SPANS = 4096
"""Spans that wait to be sent; when the queue is full, further ones are lost."""
TIMEOUT_SECS = 5.0
CLOSE_SECS = 2.0
"""How long the end of cortex waits for the last spans."""
WARN_SECS = 60.0


class Tracing:
    """The traces of one process."""

    def __init__(self, settings: TracingSettings) -> None:
        """`settings` has an endpoint."""
        _quieten()
        exporter = QuietExporter(OTLPSpanExporter(f"{settings.endpoint}/v1/traces", timeout=TIMEOUT_SECS))
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": "cortex"}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS, schedule_delay_millis=1000)
        )
        self._tracer = self._provider.get_tracer("cortex")

    def begin(self, request: Request, request_id: str, path: str, *, named: bool) -> RequestTrace:
        """The trace of a request, which continues its client's. `path`: without what only the client may know; `named`:
        the trace is named by it."""
        return RequestTrace(self._tracer, request, request_id, path, named=named)

    async def close(self) -> None:
        """Sends what is left, if that does not take long."""
        # A collector that is down must not hold cortex back: the SDK tries for minutes.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        await asyncio.to_thread(last.join, CLOSE_SECS)


class _OnceAMinute(logging.Handler):
    """Passes on what the SDK logs, such as that its queue is full and spans are lost."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._passed_at = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._passed_at >= WARN_SECS:
            self._passed_at = time.monotonic()
            log.warning("traces: %s", record.getMessage())


def _quieten() -> None:
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL + 1)  # it logs each failed attempt
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate, sdk.handlers = False, [_OnceAMinute()]


class QuietExporter(SpanExporter):
    """Says once a minute at most that spans are lost, instead of each time."""

    def __init__(self, exporter: SpanExporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._exporter = exporter
        self._clock = clock
        self._warned_at = float("-inf")
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            if self._clock() - self._warned_at >= WARN_SECS:
                self._warned_at = self._clock()
                log.warning("%d spans are lost: the collector at [tracing] endpoint does not take them", self._lost)
                self._lost = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
