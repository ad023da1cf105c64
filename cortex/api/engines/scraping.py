"""What Prometheus asks cortex for: its own metrics, those of the engines, and where the neurons' are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

from aiohttp import web

from cortex.api.app_keys import COUNTS, FLEET, METRICS
from cortex.api.engines.engine_questions import EngineQuestions, NoAnswer
from cortex.api.engines.metrics_pages import MetricsPages
from cortex.fleet.neuron_client import NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot
from cortex.upstream.address import parse_url
from shared.tasks import timeout

log = logging.getLogger(__name__)

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ACCEPT: Final = b"text/plain;version=0.0.4"
ENGINE_SECS: Final = 5.0
"""How long the engines may take, all at the same time. Prometheus waits 10 s by default."""
MAX_PAGE_BYTES: Final = 2 << 20
"""Limit for the page of one engine. vLLM's takes about 100 KiB."""
MAX_TOTAL_BYTES: Final = 64 << 20
"""Limit for the pages of all engines. The pages beyond are left out."""

ENGINE_QUESTIONS = web.AppKey("engine_questions", EngineQuestions)


async def expose_metrics(request: web.Request) -> web.Response:
    await request.app[COUNTS].refresh()
    metrics = request.app[METRICS]
    await asyncio.to_thread(metrics.measure_disk)
    return web.Response(body=metrics.exposition(), headers={"Content-Type": METRICS_TYPE})


async def expose_engine_metrics(request: web.Request) -> web.Response:
    """The metrics of every loaded engine on one page."""
    engines = list(loaded_engines(request.app[FLEET].snapshot()))
    found = await asyncio.gather(*(_page(request.app, engine) for engine in engines))
    pages = [(engine, page) for engine, page in zip(engines, found, strict=True) if page is not None]
    body, failures = await asyncio.to_thread(one_page, pages)
    for engine, reason in failures:
        _count_failure(request.app, engine, reason)
    return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})


async def _page(app: web.Application, engine: EngineSnapshot) -> bytes | None:
    """None if the engine gives none in time, which is counted."""
    try:
        async with timeout(ENGINE_SECS):
            return await app[ENGINE_QUESTIONS].ask(engine, b"/metrics", accept=_ACCEPT, max_bytes=MAX_PAGE_BYTES)
    except (NoAnswer, NeuronRefused, NeuronUnreachable, asyncio.TimeoutError) as error:
        _count_failure(app, engine, str(error) or "timed out")
        return None


def one_page(found: Iterable[tuple[EngineSnapshot, bytes]]) -> tuple[bytes, list[tuple[EngineSnapshot, str]]]:
    """The pages of these engines as one, and the engines that are not on it, each with the reason. Pure."""
    pages, size = MetricsPages(), 0
    failures: list[tuple[EngineSnapshot, str]] = []
    for engine, page in found:
        size += len(page)
        labels = {"model": engine.key.model_id, "node": engine.key.node, "instance": engine.key.instance}
        if size > MAX_TOTAL_BYTES:
            failures.append((engine, f"the pages of all engines exceed {MAX_TOTAL_BYTES >> 20} MiB"))
        elif not pages.add(page.decode("utf-8", "replace"), labels):
            failures.append((engine, "its page has no samples"))
    return pages.text().encode(), failures


def _count_failure(app: web.Application, engine: EngineSnapshot, reason: str) -> None:
    app[METRICS].engine_scrape_failed(engine.key.model_id, engine.key.node)
    log.debug("metrics of %s on %s: %s", engine.key.model_id, engine.key.name, reason)


def loaded_engines(fleet: FleetSnapshot) -> Iterator[EngineSnapshot]:
    """The engines that answer HTTP now. Pure."""
    return (engine for node in fleet.healthy for engine in node.every_engine() if engine.view.servable_now)


async def show_targets(request: web.Request) -> web.Response:
    """Where there are metrics, as Prometheus reads it (`http_sd_configs`)."""
    targets = [
        _target("cortex", "http", request.host, "/metrics"),
        _target("engines", "http", request.host, "/metrics/engines"),
        *(_neuron_target(node) for node in request.app[FLEET].snapshot().nodes.values()),
    ]
    return web.json_response(targets)


def _neuron_target(node: NodeSnapshot) -> dict[str, Any]:
    address, prefix = parse_url(node.endpoint)
    host = f"[{address.host}]" if ":" in address.host else address.host
    scheme, path = "https" if address.tls else "http", f"{prefix.decode()}/metrics"
    return _target("neuron", scheme, f"{host}:{address.port}", path, node=node.name)


def _target(service: str, scheme: str, target: str, path: str, **labels: str) -> dict[str, Any]:
    return {
        "targets": [target],
        "labels": {"__scheme__": scheme, "__metrics_path__": path, "service": service, **labels},
    }


async def asking_engines(app: web.Application) -> AsyncIterator[None]:
    """Closes the connections to engines when the app ends."""
    yield
    app[ENGINE_QUESTIONS].close()
