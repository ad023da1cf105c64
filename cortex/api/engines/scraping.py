"""What Prometheus asks cortex for: its own metrics, those of the engines, and where the neurons' are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from aiohttp import web

from cortex.api.app_keys import COUNTS, FLEET, METRICS
from cortex.api.engines.engine_questions import EngineQuestions, NoAnswer
from cortex.api.engines.metrics_pages import MetricsPages
from cortex.fleet.engine_url import dials
from cortex.fleet.neuron_client import NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.exporter import Metrics
from cortex.routing.replica import ReplicaKey
from cortex.upstream.address import parse_url
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ACCEPT: Final = b"text/plain;version=0.0.4"
ENGINE_SECS: Final = 5.0
"""How long an engine may take."""
PAGE_SECS: Final = 8.0
"""How long all engines may take. Prometheus waits 10 s by default."""
MAX_AT_ONCE: Final = 32
"""How many engines are asked at the same time."""
MAX_PAGE_BYTES: Final = 2 << 20
"""Limit for the page of one engine. vLLM's takes about 100 KiB."""
MAX_TOTAL_BYTES: Final = 64 << 20
"""Limit for the pages of all engines. The pages beyond are left out."""


async def expose_metrics(request: web.Request) -> web.Response:
    await request.app[COUNTS].refresh(callers=True)
    metrics = request.app[METRICS]
    await asyncio.to_thread(metrics.measure_disk)
    return web.Response(body=metrics.exposition(), headers={"Content-Type": METRICS_TYPE})


async def expose_engine_metrics(request: web.Request) -> web.Response:
    """The metrics of every loaded engine on one page."""
    return web.Response(body=await request.app[ENGINE_SCRAPES].page(), headers={"Content-Type": METRICS_TYPE})


class EngineScrapes:
    """Asks the engines for their metrics, all again for each page. Requests that come meanwhile get the same page, so
    that several Prometheus servers do not multiply the memory."""

    def __init__(self, fleet: Fleet, questions: EngineQuestions, metrics: Metrics) -> None:
        self._fleet = fleet
        self._questions = questions
        self._metrics = metrics
        self._tasks = TaskSet()
        self._scrape: asyncio.Task[bytes] | None = None

    async def page(self) -> bytes:
        if self._scrape is None:
            self._scrape = self._tasks.spawn(self._new_page(), name="metrics of engines")
            self._scrape.add_done_callback(self._forget)  # a page may be large
        return await asyncio.shield(self._scrape)

    async def close(self) -> None:
        await self._tasks.close()
        self._questions.close()

    def _forget(self, _: asyncio.Task[bytes]) -> None:
        self._scrape = None

    async def _new_page(self) -> bytes:
        engines = list(loaded_engines(self._fleet.snapshot()))
        until = asyncio.get_running_loop().time() + PAGE_SECS
        total, adding, slots = PageSum(), asyncio.Lock(), asyncio.Semaphore(MAX_AT_ONCE)

        async def add(engine: EngineSnapshot) -> None:
            try:
                async with slots:  # until its page is added, so that few are in memory
                    page = await self._ask(engine, until)
                    async with adding:
                        await asyncio.to_thread(total.add, engine.key, page)
            except NoAnswer as error:
                self._metrics.engine_scrape_failed(engine.key.model_id, engine.key.node)
                log.debug("metrics of %s on %s: %s", engine.key.model_id, engine.key.name, error)

        await asyncio.gather(*map(add, engines))
        return await asyncio.to_thread(total.text)

    async def _ask(self, engine: EngineSnapshot, until: float) -> bytes:
        """The engine's page.

        Raises:
            NoAnswer: there is none in time.
        """
        secs = min(ENGINE_SECS, until - asyncio.get_running_loop().time())
        try:
            async with timeout(secs):
                return await self._questions.ask(engine, b"/metrics", accept=_ACCEPT, max_bytes=MAX_PAGE_BYTES)
        except (NeuronRefused, NeuronUnreachable, asyncio.TimeoutError) as error:
            raise NoAnswer(str(error) or "timed out") from error


class PageSum:
    """The pages of engines as one."""

    def __init__(self) -> None:
        self._pages = MetricsPages()
        self._size = 0

    def add(self, engine: ReplicaKey, page: bytes) -> None:
        """Adds an engine's page.

        Raises:
            NoAnswer: it has no samples, or there is no room for it.
        """
        if self._size + len(page) > MAX_TOTAL_BYTES:
            raise NoAnswer(f"the pages of all engines exceed {MAX_TOTAL_BYTES >> 20} MiB")
        labels = {"model": engine.model_id, "node": engine.node, "instance": engine.instance}
        if not self._pages.add(page.decode("utf-8", "replace"), labels):
            raise NoAnswer("its page has no samples")
        self._size += len(page)

    def text(self) -> bytes:
        return self._pages.text().encode()


ENGINE_SCRAPES = web.AppKey("engine_scrapes", EngineScrapes)


def loaded_engines(fleet: FleetSnapshot) -> Iterator[EngineSnapshot]:
    """The engines that answer HTTP now. Pure."""
    return (engine for node in fleet.healthy for engine in node.every_engine() if engine.view.servable_now)


async def show_targets(request: web.Request) -> web.Response:
    """Where there are metrics, as Prometheus reads it (`http_sd_configs`). It cannot reach a neuron that dials."""
    targets = [
        _target("cortex", "http", request.host, "/metrics"),
        _target("engines", "http", request.host, "/metrics/engines"),
        *(_neuron_target(node) for node in request.app[FLEET].snapshot().nodes.values() if not dials(node.endpoint)),
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
    await app[ENGINE_SCRAPES].close()
