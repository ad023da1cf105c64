"""All wiring: nothing else constructs a part of cortex."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from cortex.api.routes import GATEWAY_ROUTES, METRICS_ROUTES
from cortex.catalogue import Catalogue
from cortex.config import CortexConfig
from cortex.fleet import Fleet
from cortex.in_flight import InFlight
from cortex.keys import PARTS, Parts
from cortex.loader import Loader
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient
from cortex.poller import NodeWatch
from cortex.proxy.forward import Forwarder
from shared.http import error_middleware
from shared.tasks import running

ENGINE_IDLE_SECS = 3.0
"""How long an idle connection to an engine is kept: below the 5 s after which vLLM's server closes it itself."""


@contextlib.asynccontextmanager
async def assembled(config: CortexConfig, catalogue: Catalogue) -> AsyncIterator[Parts]:
    """The parts of a cortex, watching its fleet inside the body. Needs a running loop."""
    fleet = Fleet(
        [(entry.name, entry.endpoint) for entry in config.neurons], unhealthy_after=config.poll.unhealthy_after
    )
    in_flight = InFlight()
    metrics = Metrics(fleet, in_flight)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=ENGINE_IDLE_SECS)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        clients = {entry.name: NeuronClient(entry, session) for entry in config.neurons}
        watches = {name: NodeWatch(client, fleet, config.poll) for name, client in clients.items()}
        loader = Loader(fleet, clients, metrics, timeout_secs=config.cold_load.timeout_secs)
        forwarder = Forwarder(
            catalogue=catalogue,
            fleet=fleet,
            loader=loader,
            clients=clients,
            watches=watches,
            in_flight=in_flight,
            metrics=metrics,
            session=session,
        )
        parts = Parts(
            config=config,
            catalogue=catalogue,
            fleet=fleet,
            in_flight=in_flight,
            metrics=metrics,
            session=session,
            clients=clients,
            watches=watches,
            loader=loader,
            forwarder=forwarder,
            created=int(time.time()),
        )
        loops = {
            f"{kind} {name}": loop
            for name, watch in watches.items()
            for kind, loop in (("poll", watch.poll_loop), ("events", watch.listen_loop))
        }
        try:
            async with running(loops):
                yield parts
        finally:
            await asyncio.gather(*(watch.close() for watch in watches.values()), loader.close())


def build_app(parts: Parts) -> web.Application:
    """The front door."""
    app = web.Application(
        middlewares=[error_middleware], client_max_size=parts.config.gateway.max_body_mib * 1024 * 1024
    )
    app[PARTS] = parts
    app.add_routes(GATEWAY_ROUTES)
    return app


def build_metrics_app(parts: Parts) -> web.Application:
    """What is served on `metrics_listen`."""
    app = web.Application(middlewares=[error_middleware])
    app[PARTS] = parts
    app.add_routes(METRICS_ROUTES)
    return app
