"""Constructs the aiohttp apps and a worker's gateway. `cortex.control.wiring` constructs the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aiohttp import web

from cortex.accounts.keys.key_table import NO_KEYS, KeyTable
from cortex.accounts.prices import NO_PRICES, PriceList, price_list
from cortex.accounts.sign_in.person import People
from cortex.accounts.usage.journal import UsageJournal
from cortex.accounts.usage.reports import usage_reports
from cortex.api.app_keys import (
    ADAPTERS,
    CLIENTS,
    COUNTS,
    CREATED,
    DECISIONS,
    FLEET,
    KEYS,
    LIVE,
    LOADER,
    METRICS,
    REGISTRATIONS,
    RELOADER,
    REQUESTS,
    SCHEDULER,
    SHUTDOWN,
    SIGN_IN,
    STORAGE,
    TIMELINE,
    USAGE_REPORTS,
)
from cortex.api.authorization import authorize
from cortex.api.engines.context_lengths import CONTEXT_LENGTHS, ContextLengths, following
from cortex.api.engines.engine_questions import EngineQuestions
from cortex.api.engines.scraping import ENGINE_SCRAPES, EngineScrapes, asking_engines
from cortex.api.fleet.changes import FLEET_CHANGES, FleetChanges
from cortex.api.fleet.view import FLEET_VIEW, FleetView
from cortex.api.models import MODEL_LIST, ModelList
from cortex.api.routes import CONTROL_ROUTES, METRICS_ROUTES
from cortex.config.gateway import GatewaySettings, parse_listen
from cortex.config.settings import CortexConfig
from cortex.control.reload import Reloader
from cortex.control.wiring import Parts
from cortex.http.access_log import AccessLog
from cortex.http.server import accepting
from cortex.metrics.tracing.opening import open_tracing
from cortex.proxy.authentication import Authentication
from cortex.proxy.context import ProxyContext
from cortex.proxy.gateway import Gateway
from cortex.routing.control import Control
from cortex.upstream.address import Address
from shared.cross_site import CrossSitePolicy
from shared.errors import Unauthorized
from shared.http import Handler, error_middleware, hide_server, refuse_cross_site, require_json, require_token
from shared.serve import BACKLOG
from shared.tasks import running
from shared.tls import RenewedContext, server_context

TICKS_OF_SILENCE = 10
"""A silent stream is noticed within this part of `[gateway] keepalive_secs`."""


def build_control_app(parts: Parts, reloader: Reloader | None = None) -> web.Application:
    """Every route that no engine answers. Workers hand its requests on. Without `reloader` there are no files to read
    the configuration from."""
    app = web.Application(
        middlewares=[error_middleware, _own_user_only, authorize, require_json],
        client_max_size=parts.config.gateway.max_body_mib * 1024 * 1024,
    )
    app.on_response_prepare.append(hide_server)
    app[LIVE] = parts.live
    app[FLEET] = parts.fleet
    app[CLIENTS] = parts.clients
    app[DECISIONS] = parts.decisions
    app[SCHEDULER] = parts.scheduler
    app[LOADER] = parts.loader
    app[ADAPTERS] = parts.adapters
    app[COUNTS] = parts.counts
    app[SHUTDOWN] = parts.shutdown
    app[CREATED] = parts.created
    app[TIMELINE] = parts.timeline
    app[REQUESTS] = parts.requests
    app[KEYS] = parts.keys
    app[REGISTRATIONS] = parts.registrations
    app[SIGN_IN] = parts.sign_in
    app[STORAGE] = parts.storage
    app[RELOADER] = reloader
    app[USAGE_REPORTS] = usage_reports(parts.database, parts.live)
    app[MODEL_LIST] = ModelList()
    app[CONTEXT_LENGTHS] = ContextLengths(parts.fleet, parts.state, parts.clients, parts.broker_address)
    app.cleanup_ctx.append(following)
    app[FLEET_VIEW] = FleetView(
        live=parts.live,
        fleet=parts.fleet,
        loader=parts.loader,
        scheduler=parts.scheduler,
        queue=parts.queue,
        counts=parts.counts,
        demand=parts.demand,
        storage=parts.storage,
    )
    app[FLEET_CHANGES] = FleetChanges(app[FLEET_VIEW])
    app.on_cleanup.append(_close_changes)
    app.add_routes(CONTROL_ROUTES)
    return app


async def _close_changes(app: web.Application) -> None:
    await app[FLEET_CHANGES].close()


def build_metrics_app(parts: Parts) -> web.Application:
    """What is served on `metrics_listen`."""
    policy, token = cross_site_policy(parts.config.gateway), parts.config.gateway.metrics_bearer_token
    checks = [refuse_cross_site(policy)] if token is None else [refuse_cross_site(policy), require_token(token)]
    app = web.Application(middlewares=[error_middleware, *checks])
    app.on_response_prepare.append(hide_server)
    app[COUNTS] = parts.counts
    app[METRICS] = parts.metrics
    app[FLEET] = parts.fleet
    app[ENGINE_SCRAPES] = EngineScrapes(
        parts.fleet, EngineQuestions(parts.clients, parts.broker_address), parts.metrics
    )
    app.cleanup_ctx.append(asking_engines)
    app.add_routes(METRICS_ROUTES)
    return app


def cross_site_policy(settings: GatewaySettings) -> CrossSitePolicy:
    """Which web pages and names cortex accepts requests from and under."""
    listens = (settings.listen, settings.metrics_listen)
    own = (socket.gethostname(), *(parse_listen(listen)[0] for listen in listens))
    return CrossSitePolicy(
        origins_key="[gateway] allowed_origins",
        hosts_key="[gateway] allowed_hosts",
        origins=frozenset(settings.allowed_origins),
        hosts=frozenset(name.lower() for name in (*settings.allowed_hosts, *own)),
    )


def control_socket() -> socket.socket:
    """Where workers reach the control app: in Linux's abstract namespace, so that no file is left when the
    process is killed. Each request is checked for its user."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def control_address(sock: socket.socket) -> Address:
    return Address(sock.getsockname().decode("ascii"), 0)


@contextlib.asynccontextmanager
async def working(
    control: Control,
    config: CortexConfig,
    socks: Sequence[socket.socket],
    address: Address,
    *,
    keys: KeyTable = NO_KEYS,
    people: People | None = None,
    prices: PriceList = NO_PRICES,
    usage_directory: Path | None = None,
    broker: str | None = None,
) -> AsyncIterator[Gateway]:
    """A worker: serves clients on `socks` inside the body, and lets them finish after it. `address` is the control
    app's, `keys` are those of clients, `people` knows those that sign in. Usage is written to `usage_directory`, and
    lost without one. `broker` as for `EnginePool`."""
    info = logging.getLogger().isEnabledFor(logging.INFO)
    context = ProxyContext(
        control,
        config,
        access_log=AccessLog(sys.stderr.write if info else None, as_json=config.log_format == "json"),
        broker=broker,
    )
    context.tracing = open_tracing(config.tracing)
    if usage_directory is not None:
        context.usage = UsageJournal(usage_directory, prices, context.counters.usage_records_dropped)
    max_body_bytes = config.gateway.max_body_mib * 1024 * 1024
    gateway = Gateway(
        context,
        control_address=address,
        max_body_bytes=max_body_bytes,
        cross_site_policy=cross_site_policy(config.gateway),
        authentication=Authentication(keys, config, people),
    )
    files = config.gateway.tls_files
    tls = None if files is None else await asyncio.to_thread(RenewedContext, files, server_context)
    try:
        async with (
            accepting(
                gateway,
                socks,
                drain_timeout_secs=config.gateway.drain_timeout_secs,
                tick_secs=config.gateway.keepalive_secs / TICKS_OF_SILENCE,
                tls=tls,
            ),
            running({} if tls is None else {"TLS files": tls.watch_loop}),
        ):
            yield gateway
    finally:
        await context.close()


@contextlib.asynccontextmanager
async def serving_here(
    parts: Parts, socks: Sequence[socket.socket], address: Address, *, usage_directory: Path | None = None
) -> AsyncIterator[Gateway]:
    """The only worker, in the control's own process."""
    keys, prices = parts.keys, price_list(parts.live)
    async with working(
        parts.resolver,
        parts.config,
        socks,
        address,
        keys=keys.table,
        people=parts.sign_in,
        prices=prices,
        usage_directory=usage_directory,
        broker=parts.broker_address,
    ) as gateway:
        parts.counts.attach(gateway)
        parts.requests.attach(gateway)

        def configure() -> None:
            gateway.configure(parts.live.config)
            gateway.use_prices(price_list(parts.live))

        subscriptions = [
            parts.live.changes.subscribe(configure),
            parts.routes.retired.subscribe(gateway.retire),
            keys.changes.subscribe(lambda: gateway.use_keys(keys.table)),
        ]
        try:
            yield gateway
        finally:
            for unsubscribe in subscriptions:
                unsubscribe()
            gateway.draining = True  # first: clients refused from now on should go elsewhere, not retry here
            parts.shutdown.begin()
            parts.counts.detach(gateway)
            parts.requests.detach(gateway)


_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the process at the other end (unix(7), SO_PEERCRED)


@web.middleware
async def _own_user_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An abstract socket has no permissions, so ask the kernel which user is at the other end."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.getuid():
            raise Unauthorized("this socket belongs to another user")
    return await handler(request)
