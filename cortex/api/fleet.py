"""`/fleet`: the whole picture, and the operator's actions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from cortex.api.app_keys import PARTS, Parts
from cortex.api.fleet_view import MIN_INTERVAL_SECS, PICTURE
from cortex.control.explain import explain
from cortex.control.routing import Refuse, Serve, decide
from cortex.fleet.neuron_client import NeuronLeft, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import NodeLeft
from cortex.placement.feasibility import infeasible_reason
from cortex.placement.refusal import RETRY_AFTER_NODE_SECS
from shared.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable, UpstreamError
from shared.http import read_model
from shared.protocol import ModelStatus
from shared.protocol.commands import ModelId
from shared.serve import CLOSING
from shared.tasks import first_of, timeout

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
    waits = {"change": parts.fleet.changed_since(version), "closing": closing.wait()}
    return await first_of(waits, timeout_secs=KEEPALIVE_SECS) is not None


async def explain_model(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    name = request.query.get("model")
    if not name:
        raise InvalidRequest("the query parameter 'model' is required", param="model")
    model_id = parts.catalogue.resolve(name)
    return web.json_response(explain(model_id, parts.scheduler.view(), parts.counts.in_flight))


async def load_model(request: web.Request) -> web.Response:
    """Loads a model, by default where the planner wants it. Waits; `?wait=false` answers 202 at once."""
    parts = request.app[PARTS]
    action = await read_model(request, ModelAction)
    model_id = parts.catalogue.resolve(action.model)
    serving = _serving(parts, model_id, action.node)
    if serving is not None:
        return web.json_response({"status": "loaded", "model": model_id, "node": serving})
    started = time.monotonic()
    job = parts.scheduler.load(model_id, action.node)
    coming = parts.fleet.snapshot().coming(model_id)
    node = action.node or (job.node if job is not None else None if coming is None else coming.name)
    if request.query.get("wait") == "false":
        return web.json_response({"status": "loading", "model": model_id, "node": node}, status=202)
    await parts.stopping.unless_begun(_until_loaded(parts, model_id, node, None if job is None else job.task))
    took = round(time.monotonic() - started, 3)
    return web.json_response({"status": "loaded", "model": model_id, "node": node, "load_secs": took})


async def _until_loaded(parts: Parts, model_id: str, node: str | None, task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.shield(task)
    if node is not None:
        await _until_settled(parts, model_id, node)


def _serving(parts: Parts, model_id: str, node_name: str | None) -> str | None:
    """A neuron that has the model loaded, the named one if one is named; None when it is to be loaded.

    Raises:
        ServiceError: it cannot be.
    """
    fleet = parts.fleet.snapshot()
    profile = parts.catalogue.profile(model_id)
    if node_name is None:
        decision = decide(model_id, parts.catalogue, fleet, parts.counts.in_flight)
        if isinstance(decision, Serve):
            return decision.nodes[0]
        failed = any(
            node.healthy and node.status_of(model_id) is ModelStatus.FAILED for node in fleet.holders(model_id)
        )
        if isinstance(decision, Refuse) and not failed:
            raise decision.error
        return None
    node = _usable_node(parts, node_name)
    if node.status_of(model_id) is ModelStatus.LOADED:
        return node.name
    if profile is None:
        if model_id not in node.models:
            raise _no_model(model_id)
        return None
    reason = infeasible_reason(profile, node)
    if reason is not None:
        raise Conflict(f"{node.name} cannot hold {model_id!r}: {reason}", code="no_feasible_neuron", param="node")
    return None


async def _until_settled(parts: Parts, model_id: str, name: str) -> None:
    """Returns when the model is loaded there.

    Raises:
        Unavailable: it is not.
    """

    def settled(node: NodeSnapshot) -> bool:
        return not (node.healthy and node.has_coming(model_id))

    with contextlib.suppress(asyncio.TimeoutError, NodeLeft):
        async with timeout(parts.loader.timeout_secs):
            await parts.fleet.until(name, settled)
    node = parts.fleet.snapshot().nodes.get(name)
    if node is None:
        raise Unavailable(
            f"{name} has left the configuration while it loaded {model_id!r}",
            code="neuron_unavailable",
            retry_after=RETRY_AFTER_NODE_SECS,
        )
    if node.status_of(model_id) is not ModelStatus.LOADED:
        bar = parts.scheduler.view().bar(model_id, name)
        view = node.models.get(model_id)
        said = "it is not there" if view is None else view.error or f"it is {view.status}"
        message = f"loading {model_id!r} on {name} failed: {said}" if bar is None else bar.reason
        wait = 5.0 if bar is None else bar.until - time.monotonic()
        raise Unavailable(message, code="cold_load_failed", retry_after=wait)


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
    client, watch = parts.clients[node], parts.watches[node]
    try:
        await client.unload(model_id, timeout_secs=UNLOAD_TIMEOUT_SECS)
    except NeuronRefused as error:
        if error.status == 404:
            raise NotFound(f"{node}: {error.message}", code="model_not_found", param="model") from error
        raise UpstreamError(f"{node}: {error.message}", code="unload_failed") from error
    except NeuronUnreachable as error:
        raise Unavailable(str(error), code="neuron_unavailable", retry_after=5) from error
    except NeuronLeft as error:
        raise Unavailable(
            f"{node} has left the configuration while it unloaded {model_id!r}",
            code="neuron_unavailable",
            retry_after=RETRY_AFTER_NODE_SECS,
        ) from error
    finally:
        await watch.refresh()


async def drain_node(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    return await _set_draining(parts, _node_named(parts, request.match_info["name"]).name, draining=True)


async def resume_node(request: web.Request) -> web.Response:
    """Also for a neuron that was drained and has left the configuration since: it is forgotten."""
    parts = request.app[PARTS]
    name = request.match_info["name"]
    if name not in parts.state.drained:
        _node_named(parts, name)
    return await _set_draining(parts, name, draining=False)


async def _set_draining(parts: Parts, name: str, *, draining: bool) -> web.Response:
    """Answers when it is written down: what the operator has read outlives cortex."""
    if name in parts.fleet.snapshot().nodes:
        parts.fleet.set_draining(name, draining)
    parts.state.set_drained(name, draining)
    await parts.state.flush()
    answer: dict[str, Any] = {"node": name, "draining": draining}
    if parts.state.problem is not None:
        answer["warning"] = f"not kept over a restart: {parts.state.problem}"
    return web.json_response(answer)


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
    """200 while anything can be served: `degraded` when a neuron is missing; 503 without any, and when cortex stops."""
    parts = request.app[PARTS]
    fleet, stops = parts.fleet.snapshot(), parts.stopping.begun
    healthy, total = len(fleet.healthy), len(fleet.nodes)
    status = "ok" if healthy == total and total and not stops else "degraded"
    body = {"status": status, "nodes": {"healthy": healthy, "total": total}}
    return web.json_response(body, status=200 if healthy and not stops else 503)
