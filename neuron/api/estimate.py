"""`GET /estimate`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace

from aiohttp import web
from pydantic import ValidationError

from neuron.api.app_keys import SERVICES, Services
from neuron.estimate.estimator import estimate_of
from neuron.estimate.options import OPTIONS, with_options
from neuron.estimate.reply import reply_of
from neuron.harness.checks import spec_of
from neuron.harness.registry import harness_of
from neuron.lifecycle.admission import check_model_roots
from neuron.lifecycle.instance_state import InstanceState
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.http import reply
from shared.protocol import MAX_MODEL_ID_CHARS, LoadCommand

_PARAMETERS = frozenset({"model", *OPTIONS})


async def estimate(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    query = _query(request)
    spec, known = _spec_of(query, services)
    estimator = harness_of(spec.harness, services.config).estimator
    if estimator is None:
        raise InvalidRequest(f"model: harness {spec.harness!r} cannot estimate memory", param="model")
    options = estimator.options_of(spec)
    options = with_options(options if known else replace(options, tensor_parallel=None), query)
    await check_model_roots(spec.source, services.config.model_roots, param="model")
    topology = await services.source.discover()
    environ = await asyncio.to_thread(
        services.home.usable,
        {**os.environ, **services.config.harness_settings(spec.harness).env},
        model=spec.source,
        caches=harness_of(spec.harness, services.config).cache_variables,
    )
    made = await estimate_of(estimator, spec, topology, environ, options)
    return reply(reply_of(query["model"], made))


def _query(request: web.Request) -> Mapping[str, str]:
    for name in request.query:
        if name not in _PARAMETERS:
            known = ", ".join(sorted(_PARAMETERS))
            raise InvalidRequest(f"unknown parameter {name[:80]!r} (known: {known})", param=name[:80])
        if len(request.query.getall(name)) > 1:
            raise InvalidRequest(f"{name}: given more than once", param=name)
    if not request.query.get("model"):
        raise InvalidRequest("model: required (an id or a path)", param="model")
    return request.query


def _spec_of(query: Mapping[str, str], services: Services) -> tuple[EngineSpec, bool]:
    """The remembered spec of the model, or one made from its name; and whether it was remembered.

    The harness's `extra_args` are appended, as on the command line.
    """
    name = query["model"]
    known = [model for model in services.registry.models if model.model_id == name]
    remembered = min(known, key=InstanceState.preference).spec if known else None
    quant = query.get("quant")
    try:
        command = LoadCommand(model_id=name, quant=quant, harness=None)
        made = spec_of(command, services.config)  # refuses whatever a load would refuse
    except ValidationError as error:
        raise InvalidRequest(
            f"model: {name[:80]!r} has more than {MAX_MODEL_ID_CHARS} characters", param="model"
        ) from error
    except InvalidRequest as error:
        message = error.message.replace("model_id:", "model:", 1)
        raise InvalidRequest(message, param="model" if error.param == "model_id" else error.param) from error
    spec = remembered or made
    extra = services.config.harness_settings(spec.harness).extra_args
    return replace(spec, args=(*spec.args, *extra)), remembered is not None


def add_routes(app: web.Application) -> None:
    app.router.add_get("/estimate", estimate)
