"""Builds and wires all parts of a neuron."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from neuron.api import adapters as adapter_api
from neuron.api import estimate as estimate_api
from neuron.api import groups as group_api
from neuron.api.announcer import Announcer
from neuron.api.app_keys import SERVICES, Services
from neuron.api.leases import LeaseTable
from neuron.api.protocol_v1 import ProtocolV1
from neuron.api.routes import add_routes
from neuron.config import NeuronConfig
from neuron.engine.keys import FILE_NAME as V1_CALLERS_FILE
from neuron.engine.keys import EngineKeys
from neuron.engine.records import boot_id
from neuron.engine.state_dir import StateDir
from neuron.gpu.device_watch import DeviceWatch
from neuron.gpu.discovery import topology_source
from neuron.gpu.energy.meter import FILE_NAME as ENERGY_FILE
from neuron.gpu.energy.meter import EnergyMeter
from neuron.gpu.energy.sharing import Resident
from neuron.harness.installed import InstalledEngines
from neuron.lifecycle.admission import Admission
from neuron.lifecycle.default_models import DefaultModels
from neuron.lifecycle.engine_life import EngineTools
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.events import EventHub, ModelEvents
from neuron.lifecycle.group_network import GroupListeners
from neuron.lifecycle.instance_supervisor import InstanceSupervisor
from neuron.lifecycle.launcher import Launcher
from neuron.lifecycle.registry import Registry
from neuron.lifecycle.serving.engine_adapters import EngineAdapters
from neuron.lifecycle.serving.engine_sleep import EngineSleep
from neuron.lifecycle.spare.spares import Spares
from neuron.memory.host import with_host_ram
from neuron.metrics import NeuronMetrics
from neuron.progress.history import FILE_NAME, LoadHistory
from shared.cross_site import CrossSitePolicy
from shared.http import error_middleware, hide_server, refuse_cross_site, require_json, require_token
from shared.tasks import TaskSet, keep_running


def build_app(config: NeuronConfig, *, port: int) -> web.Application:
    """A neuron that is served on `port`; its engines live as long as the app does.

    Starting it raises StateDirError or SettingsError when its directory or its `[simulate]` cannot be used.
    """
    token = config.bearer_token
    authentication = [] if token is None else [require_token(token)]
    guards = [refuse_cross_site(cross_site_policy(config)), *authentication, require_json]
    app = web.Application(middlewares=[error_middleware, *guards])
    app.on_response_prepare.append(hide_server)
    add_routes(app)
    estimate_api.add_routes(app)
    adapter_api.add_routes(app)
    group_api.add_routes(app)

    async def services(app: web.Application) -> AsyncIterator[None]:
        async with _services(config, port) as made:
            app[SERVICES] = made
            yield

    async def begin_stop(app: web.Application) -> None:
        # Before HTTP drains, or the drain would wait for callers whose loads are cancelled anyway. Listeners get as
        # their last events that the models take no new requests.
        if SERVICES in app:
            app[SERVICES].registry.begin_stop()
            app[SERVICES].hub.close()

    app.cleanup_ctx.append(services)
    app.on_shutdown.append(begin_stop)
    return app


def cross_site_policy(config: NeuronConfig) -> CrossSitePolicy:
    """No web page talks to a neuron. With a token any Host is accepted, as a page cannot know the token: a cortex may
    reach this host under any name."""
    own = (socket.gethostname(), config.host, *config.allowed_hosts)
    return CrossSitePolicy(
        origins_key="cortex's [gateway] allowed_origins and send its requests there",
        hosts_key="allowed_hosts in neuron.toml",
        hosts=None if config.bearer_token is not None else frozenset(map(str.lower, own)),
    )


@contextlib.asynccontextmanager
async def _services(config: NeuronConfig, port: int) -> AsyncIterator[Services]:
    async with contextlib.AsyncExitStack() as stack:
        state = await _held_state(config, port, stack)
        meter = await _meter(state)
        source = with_host_ram(topology_source(config, state.vram, meter.requests_on), config, state.vram)
        stack.push_async_callback(source.close)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        hub, metrics = EventHub(), NeuronMetrics()
        found = await asyncio.to_thread(state.found)
        numbers = itertools.count(1 + max((int(each.directory.path.name) for each in found), default=0))
        history = await _load_history(state)
        memory = EngineMemory(config, source, history)
        keys = await _engine_keys(config, state)
        spares = Spares(config, state, numbers, memory)
        stack.push_async_callback(spares.close)
        groups, installed = GroupListeners(config.group), InstalledEngines()
        stack.callback(groups.close_all)
        stack.push_async_callback(installed.close)
        launcher = Launcher(
            config, source, state, http, memory, spares=spares, groups=groups, installed=installed, numbers=numbers
        )
        sleep, adapters = EngineSleep(config, memory, http, spares), EngineAdapters(config, http)
        tools = EngineTools(memory, sleep, adapters, history, keys, http, spares)
        new_supervisor = functools.partial(
            InstanceSupervisor, config=config, launcher=launcher, tools=tools, events=ModelEvents(hub, metrics)
        )
        admission = Admission(config, source, history, state.home)
        registry = Registry(
            config, admission=admission, memory=memory, launcher=launcher, new_supervisor=new_supervisor
        )
        meter.residents, ports = functools.partial(_residents, registry), functools.partial(_engine_ports, registry)
        announcements = TaskSet()
        stack.push_async_callback(announcements.close)  # after stop_all: with dial = "out" they carry running answers
        stack.push_async_callback(registry.stop_all)
        await registry.adopt(found)
        state.keep = False  # only now: a start that fails must not lose running engines
        default_models = DefaultModels(registry, config.default_commands)
        device_watch, own_id = DeviceWatch(source, hub.publish, meter), str(uuid.uuid4())
        announcer = Announcer(config, http, port=port, instance_id=own_id, engine_ports=ports)
        _ = announcements.spawn(announcer.run(), name="announcements")
        stack.push_async_callback(_running(default_models, spares, device_watch).close)
        yield Services(
            config=config,
            instance_id=own_id,
            started=time.monotonic(),
            source=source,
            device_watch=device_watch,
            meter=meter,
            home=state.home,
            memory=memory,
            registry=registry,
            adapters=adapters,
            v1=ProtocolV1(registry, keys),
            hub=hub,
            default_models=default_models,
            metrics=metrics,
            spares=spares,
            leases=LeaseTable(),
            group_listeners=groups,
        )


async def _held_state(config: NeuronConfig, port: int, stack: contextlib.AsyncExitStack) -> StateDir:
    """The state directory, which no other neuron uses until `stack` ends."""
    state = StateDir(await asyncio.to_thread(config.state_directory, port))
    holding = state.held(remove_after=config.state_dir is None)
    await asyncio.to_thread(holding.__enter__)
    stack.push_async_callback(asyncio.to_thread, holding.__exit__, None, None, None)
    return state


def _running(default_models: DefaultModels, spares: Spares, device_watch: DeviceWatch) -> TaskSet:
    """What runs beside the requests, until `TaskSet.close`."""
    tasks = TaskSet()
    _ = tasks.spawn(default_models.load_all(), name="default models")
    _ = tasks.spawn(spares.run(), name="spare processes")
    watched = "condition of the GPUs"
    _ = tasks.spawn(keep_running(watched, device_watch.run), name=watched)
    return tasks


async def _meter(state: StateDir) -> EnergyMeter:
    meter = EnergyMeter(state.path / ENERGY_FILE, boot_id())
    await meter.read()
    return meter


def _residents(registry: Registry) -> list[Resident]:
    found = (model.resident() for model in registry.models)
    return [resident for resident in found if resident is not None]


def _engine_ports(registry: Registry) -> set[int]:
    return {model.engine.port for model in registry.models if model.engine is not None}


async def _load_history(state: StateDir) -> LoadHistory:
    history = LoadHistory(state.path / FILE_NAME)
    await history.read()
    return history


async def _engine_keys(config: NeuronConfig, state: StateDir) -> EngineKeys:
    has_token = config.bearer_token is not None
    keys = EngineKeys(config.engine_keys, has_token=has_token, path=state.path / V1_CALLERS_FILE)
    await keys.read()
    return keys
