"""neuron's HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

from aiohttp import web

from neuron import failures
from neuron.engine_output import EngineOutput
from neuron.events import Event, Listener
from neuron.keys import SERVICES
from neuron.log_reply import last_lines, stream_lines
from neuron.metrics import CONTENT_TYPE
from neuron.worker import State
from shared.errors import InvalidRequest
from shared.http import read_model, reply
from shared.protocol import EndpointReply, LoadCommand, LoadReply, NeuronHealth, UnloadCommand
from shared.serve import CLOSING

KEEP_ALIVE_SECS = 15.0
DEFAULT_TAIL, MAX_TAIL = 100, 10_000  # lines
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


async def discovery(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    return reply(await services.discovery())


async def health(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    devices, models = await asyncio.gather(services.source.health(), services.activity.read())
    return reply(
        NeuronHealth(
            uptime_secs=round(time.monotonic() - services.started, 3),
            devices=list(devices),
            instance_id=services.instance_id,
            activation=services.default_models.progress,
            models=models,
        )
    )


async def models(request: web.Request) -> web.Response:
    views = await request.app[SERVICES].workers.views()
    return web.json_response([view.model_dump(mode="json") for view in views])


async def load(request: web.Request) -> web.Response:
    wait = _flag(request, "wait", default=True)
    command = await read_model(request, LoadCommand)
    run = await request.app[SERVICES].workers.load(command)
    if not wait:
        return reply(LoadReply(status="loading", model_id=command.model_id), status=202)
    await run.loaded()
    return reply(LoadReply(status="loaded", model_id=command.model_id))


async def unload(request: web.Request) -> web.Response:
    command = await read_model(request, UnloadCommand)
    await request.app[SERVICES].workers.unload(command.model_id)
    return reply(LoadReply(status="unloaded", model_id=command.model_id))


async def endpoint(request: web.Request) -> web.Response:
    worker = request.app[SERVICES].workers.get(request.match_info["model_id"])
    engine = worker.engine
    if engine is None or worker.condition.state is not State.LOADED:
        raise failures.unknown_model(worker.model_id, f"is not loaded: it is {worker.condition.state.value}")
    url = engine.url
    if request.app[SERVICES].config.binds_all_addresses and request.url.host:
        with contextlib.suppress(ValueError):  # whatever stands in the Host header
            url = str(request.url.origin().with_scheme("http").with_port(engine.port))
    return reply(EndpointReply(url=url, api_key=engine.api_key))


async def logs(request: web.Request) -> web.StreamResponse:
    worker = request.app[SERVICES].workers.get(request.match_info["model_id"])
    text = request.query.get("tail", str(DEFAULT_TAIL))
    if len(text) > len(str(MAX_TAIL)) or not text.isascii() or not text.isdigit() or not 0 <= int(text) <= MAX_TAIL:
        raise InvalidRequest(f"tail: {text!r} is no number of lines from 0 to {MAX_TAIL}", param="tail")
    output = None if worker.log is None else EngineOutput(worker.log.path)
    if not _flag(request, "follow", default=False):
        return await last_lines(worker.model_id, output, int(text))
    if output is not None and worker.engine is None:
        await output.close()
    return await stream_lines(request, output, int(text), request.app[CLOSING])


async def metrics(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    topology, live = await asyncio.gather(services.source.discover(), services.source.health())
    page = services.metrics.render(services.workers.all, topology.devices, live)
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})


async def events(request: web.Request) -> web.StreamResponse:
    """First every model as it is, then each change; ends when neuron stops or this listener falls behind."""
    services = request.app[SERVICES]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    with services.hub.listening() as listener:
        # Taken after listening began: nothing can be missed, and the numbers tell what the snapshot has already.
        views = [view.model_dump(mode="json") for view in services.workers.views_now()]
        await response.write(Event(services.hub.last_number, "snapshot", json.dumps(views)).encoded())
        await _pass_on(listener, response, request.app[CLOSING])
    return response


async def _pass_on(listener: Listener, response: web.StreamResponse, closing: asyncio.Event) -> None:
    ended = asyncio.create_task(closing.wait())
    try:
        while not ended.done():
            arriving = asyncio.ensure_future(listener.next())
            try:
                await asyncio.wait({arriving, ended}, timeout=KEEP_ALIVE_SECS, return_when=asyncio.FIRST_COMPLETED)
                event = arriving.result() if arriving.done() else None
                if event is not None:
                    await response.write(event.encoded())
                elif arriving.done():
                    return
                elif not ended.done():
                    await response.write(b": keep-alive\n\n")
            finally:
                arriving.cancel()
    finally:
        ended.cancel()


def _flag(request: web.Request, name: str, *, default: bool) -> bool:
    text = request.query.get(name)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise InvalidRequest(f"{name}: {text!r} is neither true nor false", param=name)
    return _FLAGS[text.lower()]


def add_routes(app: web.Application) -> None:
    """The table of the neuron protocol. Model ids may hold slashes, percent-encoded or as they are."""
    app.router.add_get("/discovery", discovery)
    app.router.add_get("/health", health)
    app.router.add_get("/models", models)
    app.router.add_post("/models/load", load)
    app.router.add_post("/models/unload", unload)
    app.router.add_get("/models/{model_id:.+}/endpoint", endpoint)
    app.router.add_get("/models/{model_id:.+}/logs", logs)
    app.router.add_get("/events", events)
    app.router.add_get("/metrics", metrics)
