"""Traces, as a collector receives them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from pydantic import ValidationError

import cortex.config.settings
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.config.settings import TracingSettings
from cortex.metrics.tracing import tracing
from cortex.metrics.tracing.tracing import WARN_SECS, QuietExporter, _quieten
from shared.serve import Site, bind, serving
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.ports import free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


class Collector:
    """An OTLP/HTTP server that keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._came = asyncio.Condition()
        self.url = ""

    async def _take(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        async with self._came:
            self.spans += [
                span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans
            ]
            self._came.notify_all()
        return web.Response(content_type="application/x-protobuf")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Collector]:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with serving([Site(app, sock)], drain_timeout_secs=0):
            yield self

    async def until(self, name: str) -> dict[str, Span]:
        """The spans by name, once there is one with this name."""
        async with self._came:
            await self._came.wait_for(lambda: any(span.name == name for span in self.spans))
        return {span.name: span for span in self.spans}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector().running() as collector:
        yield collector


async def test_a_cold_request_is_one_trace_from_its_client_to_its_engine(
    start_cortex: StartCortex, benjy: V1Neuron, collector: Collector
) -> None:
    """The wait with the load and its phases, and the engine, which gets the context of its span."""
    cortex = await start_cortex([benjy], [{"id": "org/small"}], tracing={"endpoint": collector.url})
    body = {"model": "org/small", "messages": []}
    async with cortex.http.post(f"{cortex.url}/v1/chat/completions", json=body, headers=CLIENT) as answer:
        assert answer.status == 200
    spans = await collector.until("POST /v1/chat/completions")
    root, engine = spans["POST /v1/chat/completions"], spans["engine"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert root.parent_span_id.hex() == PARENT
    assert root.kind == Span.SPAN_KIND_SERVER
    assert spans["queue"].parent_span_id == engine.parent_span_id == root.span_id
    assert spans["load"].parent_span_id == spans["queue"].span_id
    assert spans["starting"].parent_span_id == spans["load"].span_id
    assert root.start_time_unix_nano <= spans["queue"].start_time_unix_nano <= engine.start_time_unix_nano
    ((_, headers, _),) = benjy.engine.requests
    assert headers["traceparent"] == f"00-{TRACE}-{engine.span_id.hex()}-01"
    assert headers["tracestate"] == "vendor=1"


async def test_a_failed_engine_is_a_span_with_its_error(
    start_cortex: StartCortex, benjy: V1Neuron, collector: Collector
) -> None:
    benjy.models["org/small"] = "loaded"
    benjy.engine_url = f"http://127.0.0.1:{free_port()}"
    cortex = await start_cortex([benjy], [{"id": "org/small"}], tracing={"endpoint": collector.url})
    async with cortex.chat("org/small") as answer:
        assert answer.status == 502
    spans = await collector.until("POST /v1/chat/completions")
    attributes = {each.key: each.value.string_value for each in spans["engine"].attributes}
    assert (attributes["error.type"], attributes["node"]) == ("refused", "benjy")
    root = {each.key: each.value.string_value for each in spans["POST /v1/chat/completions"].attributes}
    assert root["error.type"] == "upstream_unreachable"


async def test_a_stored_response_is_named_without_its_id(
    start_cortex: StartCortex, benjy: V1Neuron, collector: Collector
) -> None:
    """By the id others could read the response. A path that cortex does not know names nothing."""
    cortex = await start_cortex([benjy], [{"id": "org/small"}], tracing={"endpoint": collector.url})
    async with cortex.http.get(f"{cortex.url}/v1/responses/resp_secret") as answer:
        assert answer.status == 404
    async with cortex.http.post(f"{cortex.url}/made/up", json={"model": "none"}) as answer:
        assert answer.status == 404
    spans = await collector.until("POST")
    stored = spans["GET /v1/responses/{id}"]
    paths = [
        each.value.string_value for span in (stored, spans["POST"]) for each in span.attributes if "path" in each.key
    ]
    assert paths == ["/v1/responses/{id}", "/made/up"]


async def test_a_wait_for_limits_is_not_one_for_an_engine(
    start_cortex: StartCortex, benjy: V1Neuron, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit, waits = LocalLimiter.admit, iter([False, True])  # the second request, as where limits are in PostgreSQL
    monkeypatch.setattr(LocalLimiter, "admit", lambda *asked: None if next(waits, False) else admit(*asked))
    benjy.models["org/small"] = "loaded"
    limited = {"id": "org/small", "limit": {"rpm": 5}}
    cortex = await start_cortex([benjy], [limited], tracing={"endpoint": collector.url})
    waits_told = []
    for _ in range(2):
        async with cortex.chat("org/small") as answer:
            assert answer.status == 200
        async with cortex.http.get(f"{cortex.metrics_url}/metrics") as answer:
            page = await answer.text()
        waits_told.append([line for line in page.splitlines() if line.startswith("cortex_request_wait_seconds")])
    assert "admission" in await collector.until("admission")
    assert waits_told[0] == waits_told[1]


async def test_without_tracing_the_clients_own_context_goes_on(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models["org/small"] = "loaded"
    cortex = await start_cortex([benjy], [{"id": "org/small"}])
    body = {"model": "org/small", "messages": []}
    async with cortex.http.post(f"{cortex.url}/v1/chat/completions", json=body, headers=CLIENT) as answer:
        assert answer.status == 200
    ((_, headers, _),) = benjy.engine.requests
    assert {name: headers[name] for name in CLIENT} == CLIENT


def test_lost_spans_are_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.FAILURE

    now, span = 0.0, ReadableSpan("request")
    exporter = QuietExporter(Failing(), lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            exporter.export([span, span])
        now = WARN_SECS
        exporter.export([span])
    assert [message.partition(" spans are lost")[0] for message in caplog.messages] == ["2", "5"]


def test_a_full_queue_is_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    _quieten()
    for _ in range(3):
        logging.getLogger("opentelemetry.sdk.any").warning("Queue full, dropping %s.", "Span")
        logging.getLogger("opentelemetry.exporter.any").error("an attempt failed")
    assert caplog.messages == ["traces: Queue full, dropping Span."]


async def test_a_collector_that_is_down_fails_no_request(
    monkeypatch: pytest.MonkeyPatch, start_cortex: StartCortex, benjy: V1Neuron
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_SECS", 0.0)
    benjy.models["org/small"] = "loaded"
    settings = {"endpoint": f"http://127.0.0.1:{free_port()}"}
    cortex = await start_cortex([benjy], [{"id": "org/small"}], tracing=settings)
    async with cortex.chat("org/small") as answer:
        assert answer.status == 200


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cortex.config.settings, "_has_opentelemetry", lambda: False)
    with pytest.raises(ValidationError, match=r"pip install 'cortex-neuron\[tracing\]'"):
        TracingSettings(endpoint="http://127.0.0.1:4318")
