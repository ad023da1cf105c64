"""`/fleet`: the whole picture, and the operator's actions."""

from __future__ import annotations

import asyncio
import contextlib
import time

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from cortex.api.picture import MIN_INTERVAL_SECS, PICTURE
from cortex.explain import explain
from cortex.keys import PARTS, Parts
from cortex.neuron_client import NeuronRefused, NeuronUnreachable
from cortex.placement import infeasible_reason
from cortex.routing import Await, Load, Refuse, Serve, command_for_known, decide, load_on
from cortex.snapshot import NodeSnapshot
from shared.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable, UpstreamError
from shared.http import read_model
from shared.protocol import ModelStatus
from shared.protocol.commands import ModelId
from shared.serve import CLOSING
from shared.tasks import timeout

KEEPALIVE_SECS = 15.0
UNLOAD_TIMEOUT_SECS = 180.0


class ModelAction(BaseModel):
    """Body of `/fleet/load` and `/fleet/unload`."""

    model_config = ConfigDict(extra="forbid")
    model: ModelId
    node: str | None = None


async def show_fleet(request: web.Request) -> web.Response:
    return web.Response(body=request.app[PICTURE].body(), content_type="application/json", charset="utf-8")


async def fleet_events(request: web.Request) -> web.StreamResponse:
    """The picture now and after every change, as server-sent events: at once after a change, and then not again within
    MIN_INTERVAL_SECS."""
    parts, picture, closing = request.app[PARTS], request.app[PICTURE], request.app[CLOSING]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    while not closing.is_set():
        version, event = picture.event()
        await response.write(event)
        await _closing_within(MIN_INTERVAL_SECS, closing)
        while parts.fleet.version == version and not closing.is_set():
            if not await _change_or_closing(parts, version, closing):
                await response.write(b": keep-alive\n\n")
    return response


async def _closing_within(secs: float, closing: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(secs):
            await closing.wait()


async def _change_or_closing(parts: Parts, version: int, closing: asyncio.Event) -> bool:
    """False when neither came within the keep-alive's time."""
    waits = [asyncio.ensure_future(parts.fleet.changed_since(version)), asyncio.ensure_future(closing.wait())]
    try:
        done, _ = await asyncio.wait(waits, timeout=KEEPALIVE_SECS, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()


async def explain_model(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    name = request.query.get("model")
    if not name:
        raise InvalidRequest("the query parameter 'model' is required", param="model")
    model_id = parts.catalogue.resolve(name)
    return web.json_response(explain(model_id, parts.catalogue, parts.fleet.snapshot(), parts.counts.in_flight))


async def load_model(request: web.Request) -> web.Response:
    """Loads a model, by default where the planner wants it. Waits; `?wait=false` answers 202 at once."""
    parts = request.app[PARTS]
    action = await read_model(request, ModelAction)
    model_id = parts.catalogue.resolve(action.model)
    plan = _plan(parts, model_id, action.node)
    if isinstance(plan, Serve):
        return web.json_response({"status": "loaded", "model": model_id, "node": plan.nodes[0]})
    started = time.monotonic()
    task = parts.loader.start(plan, after_failure=True) if isinstance(plan, Load) else None
    if request.query.get("wait") == "false":
        return web.json_response({"status": "loading", "model": model_id, "node": plan.node}, status=202)
    if task is not None:
        await asyncio.shield(task)
    else:
        await parts.loader.join(model_id)
    await parts.loader.wait_until_settled(model_id, plan.node, timeout_secs=parts.loader.timeout_secs)
    took = round(time.monotonic() - started, 3)
    return web.json_response({"status": "loaded", "model": model_id, "node": plan.node, "load_secs": took})


def _plan(parts: Parts, model_id: str, node_name: str | None) -> Serve | Await | Load:
    """What an operator's load needs: what a request would, unless a neuron is named."""
    fleet = parts.fleet.snapshot()
    profile = parts.catalogue.profile(model_id)
    if node_name is None:
        under_way = parts.loader.node_of(model_id)
        if under_way is not None:
            return Await(under_way)
        decision = decide(model_id, parts.catalogue, fleet, parts.counts.in_flight)
        if not isinstance(decision, Refuse):
            return decision
        for node in fleet.holders(model_id):
            if profile is None and node.healthy and node.status_of(model_id) is ModelStatus.FAILED:
                return Load(node.name, command_for_known(node, model_id), 0, "known there")
        raise decision.error
    node = _usable_node(parts, node_name)
    if node.status_of(model_id) is ModelStatus.LOADED:
        return Serve((node.name,))
    if profile is None:
        if model_id not in node.models:
            raise _no_model(model_id)
        return Load(node.name, command_for_known(node, model_id), 0, "known there")
    reason = infeasible_reason(profile, node)
    if reason is not None:
        raise Conflict(f"{node.name} cannot hold {model_id!r}: {reason}", code="no_feasible_neuron", param="node")
    return load_on(profile, fleet, node)


async def unload_model(request: web.Request) -> web.Response:
    """Unloads a model from one neuron, or from all that have it."""
    parts = request.app[PARTS]
    action = await read_model(request, ModelAction)
    model_id = parts.catalogue.resolve(action.model)
    if action.node is not None:
        nodes = [_usable_node(parts, action.node)]
    else:
        nodes = [
            node
            for node in parts.fleet.snapshot().holders(model_id)
            if node.healthy and node.status_of(model_id) is not ModelStatus.UNLOADED
        ]
    if not nodes:
        raise NotFound(f"no healthy neuron has {model_id!r} loaded", code="model_not_found", param="model")
    results = await asyncio.gather(*(_unload(parts, node.name, model_id) for node in nodes), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return web.json_response({"status": "unloaded", "model": model_id, "nodes": [node.name for node in nodes]})


async def _unload(parts: Parts, node: str, model_id: str) -> None:
    try:
        await parts.clients[node].unload(model_id, timeout_secs=UNLOAD_TIMEOUT_SECS)
    except NeuronRefused as error:
        if error.status == 404:
            raise NotFound(f"{node}: {error.message}", code="model_not_found", param="model") from error
        raise UpstreamError(f"{node}: {error.message}", code="unload_failed") from error
    except NeuronUnreachable as error:
        raise Unavailable(str(error), code="neuron_unavailable", retry_after=5) from error
    finally:
        await parts.watches[node].refresh()


async def drain_node(request: web.Request) -> web.Response:
    return _set_draining(request, draining=True)


async def resume_node(request: web.Request) -> web.Response:
    return _set_draining(request, draining=False)


def _set_draining(request: web.Request, *, draining: bool) -> web.Response:
    parts = request.app[PARTS]
    name = _node_named(parts, request.match_info["name"]).name
    parts.fleet.set_draining(name, draining)
    return web.json_response({"node": name, "draining": draining})


def _node_named(parts: Parts, name: str) -> NodeSnapshot:
    node = parts.fleet.snapshot().nodes.get(name)
    if node is None:
        names = ", ".join(parts.fleet.snapshot().nodes) or "none"
        raise NotFound(f"there is no neuron {name!r} (there are: {names})", code="node_not_found", param="node")
    return node


def _usable_node(parts: Parts, name: str) -> NodeSnapshot:
    node = _node_named(parts, name)
    if not node.healthy:
        raise Unavailable(f"{name} is down now: {node.last_error}", code="neuron_unavailable", retry_after=5)
    return node


def _no_model(model_id: str) -> ServiceError:
    return NotFound(f"the model {model_id!r} does not exist", code="model_not_found", param="model")


async def health(request: web.Request) -> web.Response:
    """200 while anything can be served: `degraded` when a neuron is missing; 503 without any."""
    fleet = request.app[PARTS].fleet.snapshot()
    healthy, total = len(fleet.healthy), len(fleet.nodes)
    status = "ok" if healthy == total and total else "degraded"
    body = {"status": status, "nodes": {"healthy": healthy, "total": total}}
    return web.json_response(body, status=200 if healthy else 503)
