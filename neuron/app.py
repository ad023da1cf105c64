"""All of a neuron, wired together: nothing else constructs services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from neuron.activation import DefaultModels
from neuron.activity import ActivityMonitor
from neuron.api import add_routes
from neuron.config import NeuronConfig
from neuron.discover import topology_source
from neuron.estimate import api as estimate_api
from neuron.events import EventHub
from neuron.keys import SERVICES, Services
from neuron.launcher import Launcher
from neuron.metrics import NeuronMetrics
from neuron.ports import PortPool
from neuron.state_dir import StateDir
from neuron.workers import Workers
from shared.http import error_middleware, require_token
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

_IDLE_POLL_SECS = 0.2


def build_app(config: NeuronConfig, *, port: int) -> web.Application:
    """A neuron that is served on `port`; its engines live as long as the app does.

    Starting it raises StateDirError or SettingsError when its directory or its `[simulate]` cannot be used.
    """
    token = config.bearer_token
    app = web.Application(middlewares=[error_middleware, *([require_token(token)] if token is not None else [])])
    add_routes(app)
    estimate_api.add_routes(app)

    async def services(app: web.Application) -> AsyncIterator[None]:
        async with _services(config, port) as made:
            app[SERVICES] = made
            yield

    async def stop_loads(app: web.Application) -> None:
        # Before the drain: who waits for a load would be waited for otherwise, and the load is given up anyway.
        if SERVICES in app:
            app[SERVICES].workers.refuse_loads()

    app.cleanup_ctx.append(services)
    app.on_shutdown.append(stop_loads)
    return app


@contextlib.asynccontextmanager
async def _services(config: NeuronConfig, port: int) -> AsyncIterator[Services]:
    async with contextlib.AsyncExitStack() as stack:
        state = StateDir(config.state_directory(port))
        holding = state.held(remove_after=config.state_dir is None)
        await asyncio.to_thread(holding.__enter__)
        stack.push_async_callback(asyncio.to_thread, holding.__exit__, None, None, None)
        source = topology_source(config, state.vram)
        stack.push_async_callback(source.close)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        instance_id = str(uuid.uuid4())
        hub, metrics = EventHub(), NeuronMetrics()
        launcher = Launcher(config, instance_id, source, state, http, PortPool(config.host))
        workers = Workers(config, launcher, hub, metrics)
        stack.push_async_callback(workers.stop_all)
        activity = ActivityMonitor(http, workers.engine_urls)
        stack.push_async_callback(_quiet, activity, config.drain_timeout_secs)
        default_models = DefaultModels(workers, config.default_commands)
        tasks = TaskSet()
        stack.push_async_callback(tasks.close)
        _ = tasks.spawn(default_models.load_all(), name="default models")
        stack.callback(hub.close)
        yield Services(
            config=config,
            instance_id=instance_id,
            started=time.monotonic(),
            source=source,
            workers=workers,
            hub=hub,
            activity=activity,
            default_models=default_models,
            metrics=metrics,
        )


async def _quiet(activity: ActivityMonitor, timeout_secs: float) -> None:
    """Waits until no engine has a request, for `timeout_secs` at most: engines abort what they have when they stop."""
    deadline = time.monotonic() + timeout_secs
    while any(model.in_flight or model.queue_depth for model in await activity.read(fresh_secs=0)):
        if time.monotonic() >= deadline:
            log.warning("engines still have requests after %g s: stopping them", timeout_secs)
            return
        await asyncio.sleep(_IDLE_POLL_SECS)
