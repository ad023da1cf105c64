"""LoRA adapters of engines: `POST /adapters/load` and `POST /adapters/unload`."""

from __future__ import annotations

import asyncio

from aiohttp import web

from neuron import errors as failures
from neuron.api.app_keys import SERVICES
from neuron.lifecycle.instance_state import InstanceState
from neuron.lifecycle.states import State
from shared.http import read_model, reply
from shared.protocol import AdapterCommand, AdapterReply


async def load(request: web.Request) -> web.Response:
    """Of several engines of the model without `instance`: all that are loaded."""
    command = await read_model(request, AdapterCommand)
    models = _loaded(request, command)
    await asyncio.gather(*(request.app[SERVICES].adapters.load(model, command) for model in models))
    return reply(_adapters_of(command.model_id, models))


async def unload(request: web.Request) -> web.Response:
    command = await read_model(request, AdapterCommand)
    models = _loaded(request, command)
    unloads = (request.app[SERVICES].adapters.unload(model, command.adapter) for model in models)
    if not any(await asyncio.gather(*unloads)):
        raise failures.unknown_model(command.adapter, f"is not a LoRA adapter that {command.model_id} has here")
    return reply(_adapters_of(command.model_id, models))


def _loaded(request: web.Request, command: AdapterCommand) -> list[InstanceState]:
    """Raises NotFound: no engine that is meant is loaded."""
    models = request.app[SERVICES].registry.instances(command.model_id, command.instance)
    loaded = [model for model in models if model.state is State.LOADED]
    if not loaded:
        raise failures.not_loaded(models[0].key, models[0].state.value)
    return loaded


def _adapters_of(model_id: str, models: list[InstanceState]) -> AdapterReply:
    adapters = {each.key.instance: [] if each.engine is None else list(each.engine.adapters) for each in models}
    return AdapterReply(model_id=model_id, adapters=adapters)


def add_routes(app: web.Application) -> None:
    app.router.add_post("/adapters/load", load)
    app.router.add_post("/adapters/unload", unload)
