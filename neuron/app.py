"""All of a neuron, wired together: nothing else constructs services."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from neuron.api import estimate as estimate_api
from neuron.api.app_keys import SERVICES, Services
from neuron.api.routes import add_routes
from neuron.config import NeuronConfig
from neuron.engine.ports import PortPool
from neuron.engine.state_dir import StateDir
from neuron.gpu.discovery import topology_source
from neuron.lifecycle.admission import Admission
from neuron.lifecycle.default_models import DefaultModels
from neuron.lifecycle.events import EventHub
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.registry import Registry
from neuron.metrics import NeuronMetrics
from neuron.progress.history import FILE_NAME, LoadHistory
from shared.http import error_middleware, require_token
from shared.tasks import TaskSet


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

    async def begin_stop(app: web.Application) -> None:
        # Before the drain of HTTP: who waits for a load would be waited for otherwise, and it is given up anyway. And
        # listeners must hear, as the last event, that the models take no new work.
        if SERVICES in app:
            app[SERVICES].workers.begin_stop()
            app[SERVICES].hub.close()

    app.cleanup_ctx.append(services)
    app.on_shutdown.append(begin_stop)
    return app


@contextlib.asynccontextmanager
async def _services(config: NeuronConfig, port: int) -> AsyncIterator[Services]:
    async with contextlib.AsyncExitStack() as stack:
        state = StateDir(await asyncio.to_thread(config.state_directory, port))
        holding = state.held(remove_after=config.state_dir is None)
        await asyncio.to_thread(holding.__enter__)
        stack.push_async_callback(asyncio.to_thread, holding.__exit__, None, None, None)
        source = topology_source(config, state.vram)
        stack.push_async_callback(source.close)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        instance_id = str(uuid.uuid4())
        hub, metrics = EventHub(), NeuronMetrics()
        found = await asyncio.to_thread(state.found)
        numbers = itertools.count(1 + max((int(each.directory.path.name) for each in found), default=0))
        history = LoadHistory(state.path / FILE_NAME)
        await history.read()
        admission = Admission(config, source)
        launcher = Launcher(config, source, state, http, PortPool(config.host), history, admission, numbers=numbers)
        workers = Registry(config, launcher, hub, metrics)
        stack.push_async_callback(workers.stop_all)
        await workers.adopt(found)
        state.keep = False  # not before: a start that failed would make strangers of engines that run
        default_models = DefaultModels(workers, config.default_commands)
        tasks = TaskSet()
        stack.push_async_callback(tasks.close)
        _ = tasks.spawn(default_models.load_all(), name="default models")
        yield Services(
            config=config,
            instance_id=instance_id,
            started=time.monotonic(),
            source=source,
            ledger=launcher.ledger,
            workers=workers,
            hub=hub,
            default_models=default_models,
            metrics=metrics,
        )
