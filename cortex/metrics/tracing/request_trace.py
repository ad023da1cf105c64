"""The spans of one request."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cortex.http.request import Request
from cortex.routing.replica import LoadPhase, Replica

_W3C = TraceContextTextMapPropagator()
_HEADERS = ("traceparent", "tracestate")


class RequestTrace:
    """A span for the request, and below it one for each wait, with a load and its phases, and for each engine that it
    was sent to. Times are monotonic seconds."""

    def __init__(self, tracer: Tracer, request: Request, request_id: str, path: str, *, named: bool) -> None:
        """See `Tracing.begin`."""
        given = {name: request.passed_value(name.encode()) for name in _HEADERS}
        client = _W3C.extract({name: value.decode("latin-1") for name, value in given.items() if value is not None})
        self._tracer = tracer
        self._request = request
        self._offset_ns = time.time_ns() - int(time.monotonic() * 1e9)
        method = request.method.decode("latin-1")
        self._root = tracer.start_span(
            f"{method} {path}" if named else method,
            client,
            SpanKind.SERVER,
            {"url.path": path, "request_id": request_id},
            start_time=self._unix(request.received),
        )
        self._below_root = set_span_in_context(self._root, client)
        self._below_wait = self._below_root
        self._attempt: Span | None = None

    def waited(self, what: str, since: float, until: float) -> None:
        """It has waited: for a load or a place (`queue`), for its limits (`admission`), or to learn which engine has
        made a response (`response`)."""
        span = self._span(what, self._below_root, since, until)
        self._below_wait = set_span_in_context(span, self._below_root)

    def loaded(self, phases: Sequence[LoadPhase]) -> None:
        """Its last wait was for a load with these phases."""
        if phases:
            load = self._span("load", self._below_wait, phases[0].since, phases[-1].until)
            below = set_span_in_context(load, self._below_wait)
            for phase in phases:
                self._span(phase.name, below, phase.since, phase.until)

    def sent_to(self, replica: Replica) -> None:
        """It goes to this engine now, with the context of this attempt."""
        if self._attempt is not None:
            self._attempt.end()
        key = replica.key
        names = {"model": key.model_id, "node": key.node, "instance": key.instance}
        self._attempt = self._tracer.start_span("engine", self._below_root, SpanKind.CLIENT, names)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._attempt, self._below_root))
        for name in _HEADERS:
            self._request.drop_header(name.encode())
        self._request.passed.extend(f"{name}: {value}".encode("latin-1") for name, value in carrier.items())

    def failed(self, reason: str, kind: str) -> None:
        """The engine did not answer."""
        if self._attempt is not None:
            self._attempt.set_attribute("error.type", kind)
            self._attempt.set_status(StatusCode.ERROR, reason)
            self._attempt.end()
            self._attempt = None

    def end(self, status: int, code: str, message: str) -> None:
        """It has ended; `code` and `message` of its error, "" without one."""
        if self._attempt is not None:
            self._attempt.set_attribute("http.response.status_code", status)
            self._attempt.end()
        self._root.set_attribute("http.response.status_code", status)
        if code:
            self._root.set_attribute("error.type", code)
        if code or status >= 500:
            self._root.set_status(StatusCode.ERROR, message)
        self._root.end()

    def _span(self, name: str, context: Context, since: float, until: float) -> Span:
        span = self._tracer.start_span(name, context, start_time=self._unix(since))
        span.end(self._unix(until))
        return span

    def _unix(self, at: float) -> int:
        return int(at * 1e9) + self._offset_ns
