"""neuron's HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Sequence

from aiohttp import web

from neuron import errors as failures
from neuron.api.app_keys import SERVICES, Services, called_at
from neuron.api.logs import last_lines, outputs_of, stream_lines
from neuron.api.protocol_v1 import carries_keys, plain_id
from neuron.engine.output import EngineOutput
from neuron.lifecycle.events import Event, EventSubscriber
from neuron.lifecycle.failure_cause import because, cause_of, is_permanent
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.states import State
from neuron.memory.capacity import host_memory_health, with_capacities
from neuron.metrics import CONTENT_TYPE
from shared.errors import InvalidRequest, NotFound, ServiceError
from shared.http import EVENT_STREAM_HEADERS, KEEP_ALIVE_COMMENT, read_model, reply
from shared.protocol import (
    MAX_DRAIN_SECS,
    Device,
    DeviceHealth,
    EndpointReply,
    HostMemoryHealth,
    LeaseCommand,
    LoadCommand,
    LoadReply,
    NeuronHealth,
    SleepCommand,
    UnloadCommand,
    WakeCommand,
)
from shared.serve import CLOSING
from shared.tasks import timeout

KEEP_ALIVE_SECS = 15.0
DEFAULT_TAIL, MAX_TAIL = 100, 10_000  # lines
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


async def discovery(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    return reply(await services.discovery(called_at(request)))


async def health(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    _, devices, host = await _figures(services)
    figures = NeuronHealth(
        uptime_secs=round(time.monotonic() - services.started, 3),
        devices=devices,
        host=host,
        instance_id=services.instance_id,
        activation=services.default_models.progress,
        models=services.registry.activity(),
        spares=services.spares.views(),
        energy_epoch=services.meter.epoch,
        energy=list(services.meter.instances),
    )
    if carries_keys(request):
        return reply(figures)
    return web.json_response(services.v1.health(figures.model_dump(mode="json")))


async def models(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    views = await services.registry.views()
    if not carries_keys(request):
        views = services.v1.listed(views)
    return web.json_response([view.model_dump(mode="json") for view in views])


async def load(request: web.Request) -> web.Response:
    services, keyed = request.app[SERVICES], carries_keys(request)
    with _saying_whose_fault():
        wait = _flag(request, "wait", default=True)
        command = await read_model(request, LoadCommand)
        if not keyed:
            # To such a caller an empty list of devices says nothing.
            names = {"model_id": plain_id(command.model_id), "devices": command.devices or None}
            command = command.model_copy(update=names)
        load_request = await services.registry.load(command, carries_keys=keyed)
        if command.group is not None:
            services.group_listeners.close(command.group.id)
        key = load_request.spec.key
        if not keyed:
            await services.v1.loads(command.model_id)
        if not wait:
            return reply(LoadReply(status="loading", model_id=key.model_id, instance=key.instance), status=202)
        await load_request.loaded()
        if not keyed:
            await services.v1.drop_key(key)
    return reply(_loaded(request, *key))


@contextlib.contextmanager
def _saying_whose_fault() -> Iterator[None]:
    """Adds `cause` and `permanent` to an error of a load."""
    try:
        yield
    except ServiceError as error:
        error.extra = {**error.extra, **because(cause_of(error), permanent=is_permanent(error))}
        raise


async def unload(request: web.Request) -> web.Response:
    drain_secs = _seconds(request, "drain_secs", default=0.0)
    command = await read_model(request, UnloadCommand)
    await request.app[SERVICES].registry.unload(command.model_id, command.instance, drain_secs=drain_secs)
    return reply(LoadReply(status="unloaded", model_id=command.model_id, instance=command.instance))


async def sleep(request: web.Request) -> web.Response:
    command = await read_model(request, SleepCommand)
    await request.app[SERVICES].registry.sleep(command.model_id, command.instance, level=command.level)
    return reply(LoadReply(status="sleeping", model_id=command.model_id, instance=command.instance))


async def wake(request: web.Request) -> web.Response:
    command = await read_model(request, WakeCommand)
    await request.app[SERVICES].registry.sleep(command.model_id, command.instance, level=0)
    return reply(_loaded(request, command.model_id, command.instance))


async def lease(request: web.Request) -> web.Response:
    return reply(request.app[SERVICES].leases.apply(await read_model(request, LeaseCommand)))


async def endpoint(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    model_id, instance = request.match_info["model_id"], request.query.get("instance")
    if carries_keys(request):
        model = services.registry.get(model_id, instance)
    else:
        with _saying_whose_fault():
            model = await services.v1.until_usable(model_id, instance)
    found = _endpoint_of(request, model)
    if model.engine is not None:
        model.engine.health.expect_request()
    return reply(found)


def _loaded(request: web.Request, model_id: str, instance: str | None) -> LoadReply:
    """`instance` None: any."""
    try:
        model = request.app[SERVICES].registry.get(model_id, instance)
        engine = _endpoint_of(request, model)
    except NotFound:  # it has ended since it was loaded
        return LoadReply(status="loaded", model_id=model_id, instance=instance)
    return LoadReply(
        status="loaded", model_id=model_id, instance=model.key.instance, url=engine.url, api_key=engine.api_key
    )


def _endpoint_of(request: web.Request, model: InstanceState) -> EndpointReply:
    """Where a loaded instance answers, as the caller can reach it.

    Raises:
        NotFound: it is not loaded, or a part of a group without a server.
    """
    engine = model.engine
    if engine is None or model.state is not State.LOADED:
        raise failures.not_loaded(model.key, model.state.value)
    part = engine.spec.group
    if part is not None and not part.serves:
        raise failures.no_endpoint(model.key, part)
    url = engine.api_url
    if request.app[SERVICES].config.binds_all_addresses and request.url.host:
        with contextlib.suppress(ValueError):  # an invalid Host header
            origin = str(request.url.origin().with_scheme("http").with_port(engine.port))
            url = origin + engine.harness.api_prefix
    return EndpointReply(url=url, api_key=engine.api_key)


async def logs(request: web.Request) -> web.StreamResponse:
    model_id, instance = request.match_info["model_id"], request.query.get("instance")
    registry = request.app[SERVICES].registry
    models = registry.instances(model_id, instance)
    text = request.query.get("tail", str(DEFAULT_TAIL))
    if len(text) > len(str(MAX_TAIL)) or not text.isascii() or not text.isdigit() or not 0 <= int(text) <= MAX_TAIL:
        raise InvalidRequest(f"tail: must be an integer from 0 to {MAX_TAIL}, got {text!r}", param="tail")
    if not _flag(request, "follow", default=False):
        return await last_lines(model_id, outputs_of(models), int(text))

    def present() -> dict[str, EngineOutput]:
        with contextlib.suppress(NotFound):  # the instance has left the list
            return outputs_of(registry.instances(model_id, instance))
        return {}

    return await stream_lines(request, present, int(text), request.app[CLOSING])


async def metrics(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    devices, live, host = await _figures(services)
    page = services.metrics.render(
        services.registry.models, devices, live, services.spares.views(), host, energy=services.meter.instances
    )
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})


async def events(request: web.Request) -> web.StreamResponse:
    """A snapshot of every model, then each change; ends when neuron stops or this listener falls too far behind."""
    services = request.app[SERVICES]
    response = web.StreamResponse(headers=EVENT_STREAM_HEADERS)
    await response.prepare(request)
    with services.hub.listening() as listener:
        # Taken after listening began, so no change is missed; event numbers show which ones the snapshot contains.
        views = [view.model_dump(mode="json") for view in services.registry.views_now()]
        await response.write(Event(services.hub.last_number, "snapshot", json.dumps(views)).encoded())
        await _pass_on(listener, response)
    return response


async def _pass_on(listener: EventSubscriber, response: web.StreamResponse) -> None:
    while True:
        try:
            async with timeout(KEEP_ALIVE_SECS):
                event = await listener.next()
        except asyncio.TimeoutError:
            await response.write(KEEP_ALIVE_COMMENT)
            continue
        if event is None:
            return
        await response.write(event.encoded())


async def _figures(services: Services) -> tuple[Sequence[Device], list[DeviceHealth], HostMemoryHealth | None]:
    """The devices, with what the driver measures and this neuron has booked on each now; the same of the host's RAM."""
    reading = await services.device_watch.read()
    topology, live = reading.topology, reading.health
    await services.memory.measure_filling()  # after the reading, so that what an engine takes in between is its own
    capacities = services.memory.ledger.capacities(topology, live)
    return topology.devices, with_capacities(live, capacities), host_memory_health(live, capacities)


def _flag(request: web.Request, name: str, *, default: bool) -> bool:
    text = request.query.get(name)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise InvalidRequest(f"{name}: {text!r} is neither true nor false", param=name)
    return _FLAGS[text.lower()]


def _seconds(request: web.Request, name: str, *, default: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_DRAIN_SECS:  # false for nan as well
        raise InvalidRequest(f"{name}: must be seconds from 0 to {MAX_DRAIN_SECS:g}, got {text!r}", param=name)
    return seconds


def add_routes(app: web.Application) -> None:
    """The routes of the neuron protocol. Slashes in model ids may be percent-encoded or not."""
    app.router.add_get("/discovery", discovery)
    app.router.add_get("/health", health)
    app.router.add_get("/models", models)
    app.router.add_post("/models/load", load)
    app.router.add_post("/models/unload", unload)
    app.router.add_post("/models/sleep", sleep)
    app.router.add_post("/models/wake", wake)
    app.router.add_post("/models/lease", lease)
    app.router.add_get("/models/{model_id:.+}/endpoint", endpoint)
    app.router.add_get("/models/{model_id:.+}/logs", logs)
    app.router.add_get("/events", events)
    app.router.add_get("/metrics", metrics)
