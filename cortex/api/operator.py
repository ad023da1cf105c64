"""Operator actions: load, unload, drain, resume. All go through the same scheduler and loader as requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from cortex.api.app_keys import ADAPTERS, COUNTS, DECISIONS, FLEET, LIVE, LOADER, SCHEDULER, SHUTDOWN
from cortex.api.fleet.dry_run import dry_run_answer, is_dry_run
from cortex.api.fleet.view import place
from cortex.config.durations import MAX_SECS, duration_text
from cortex.control.decision import Refuse, Serve, attachable, decide, without_adapters_error
from cortex.control.explain import after_unload
from cortex.control.load_backoff import BackoffCause
from cortex.control.load_failure import LoadFailure
from cortex.control.loads.loader import LoadJob
from cortex.control.loads.operator_plan import after_end, end_effects, load_effects, operator_plan, without_pauses
from cortex.control.scheduler import Scheduler
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.placement.feasibility import infeasible_reason
from cortex.placement.refusal import no_such_model_error
from cortex.routing.replica import ANY_NODE, ReplicaKey
from shared.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable, UpstreamError, shortened
from shared.http import read_model
from shared.protocol import ErrorCode, ModelStatus
from shared.protocol.commands import InstanceName, ModelId
from shared.retry_after import NEURON_DOWN_SECS, until_retry
from shared.tasks import timeout

BEGUN_WITHIN_SECS = 30.0
"""How long a load waits for that of another cortex, which may have to drain a model first."""

Result = TypeVar("Result")


class LoadAction(BaseModel):
    """Body of `POST /fleet/load`. Without `node` the planner chooses. `instance` names one of several engines of the
    model on that node."""

    model_config = ConfigDict(extra="forbid")
    model: ModelId
    node: str | None = None
    instance: InstanceName | None = None


class UnloadAction(LoadAction):
    """Body of `POST /fleet/unload`. Without `node`: from every node; without `instance`: all of the model's there.
    `drain`: let requests in flight finish first. `for_secs`: do not load it again before that time is over, with
    `instance` neither that one nor another on the node."""

    drain: bool = True
    for_secs: float | None = Field(default=None, gt=0, le=MAX_SECS, allow_inf_nan=False)


async def load_model(request: web.Request) -> web.Response:
    """Loads a model, by default where the planner decides; for an adapter first its base, unless that is loaded. Waits
    for the load; `?wait=false` answers 202 at once."""
    app = request.app
    action = await read_model(request, LoadAction)
    model_id = app[LIVE].catalogue.resolve(action.model)
    check_instance(app[FLEET].snapshot(), action)
    serving = _serving(app, model_id, action)
    requested, adapter = app[LIVE].catalogue.requested(model_id), _adapter(app, model_id)
    if is_dry_run(request):
        return _would_load(app, model_id, action, serving)
    await app[DECISIONS].end_holds(requested.model_id, action.node)
    if serving is not None:
        return web.json_response({"status": "loaded", "model": model_id, **place(serving)})
    started, job, able = time.monotonic(), None, _attachable(app, model_id, action)
    if not able:
        job = app[SCHEDULER].load(requested.name, action.node, action.instance)
        able = [job.plan.key if job is not None else _coming(app[FLEET].snapshot(), model_id, action)]
    if request.query.get("wait") == "false":
        if adapter is not None:  # the caller does not wait for its base
            _ = app[ADAPTERS].in_background(_all_loaded(app, able, job, adapter), name=f"load {adapter}")
        return web.json_response({"status": "loading", "model": model_id, **place(able[0])}, status=202)
    key = await app[SHUTDOWN].unless_begun(_all_loaded(app, able, job, adapter))
    took = round(time.monotonic() - started, 3)
    return web.json_response({"status": "loaded", "model": model_id, **place(key), "load_secs": took})


def _would_load(app: web.Application, model_id: str, action: LoadAction, serving: ReplicaKey | None) -> web.Response:
    if serving is not None:
        return dry_run_answer(model_id, [f"It is loaded on {serving.name}: nothing would change."])
    able = _attachable(app, model_id, action)
    if able:
        return dry_run_answer(model_id, [f"Its base is loaded on {able[0].name} and would load it."])
    name = app[LIVE].catalogue.requested(model_id).name
    view = without_pauses(app[SCHEDULER].view(), name)
    coming = action.node is None and app[SCHEDULER].job(name) is not None
    plan = None if coming else operator_plan(view, name, action.node, action.instance)
    return dry_run_answer(model_id, load_effects(plan), [] if plan is None else plan.displaces)


def _would_unload(
    app: web.Application, model_id: str, engines: list[EngineSnapshot], action: UnloadAction
) -> web.Response:
    view = app[SCHEDULER].view()
    effects = end_effects(view, engines, model_id, "is unloaded from", drain=action.drain)
    if action.for_secs is not None:
        effects.append(f"It is not loaded again for {duration_text(action.for_secs)}.")
    else:
        effects += after_end(view, engines, model_id)
    return dry_run_answer(model_id, effects)


def _adapter(app: web.Application, model_id: str) -> str | None:
    """The name of the adapter that is meant; None for any other model."""
    return model_id if model_id in app[LIVE].catalogue.adapters else None


def _attachable(app: web.Application, model_id: str, action: LoadAction) -> list[ReplicaKey]:
    """For an adapter: the engines of its base that can load it, where the action wants it."""
    keys = attachable(model_id, app[LIVE].catalogue, app[FLEET].snapshot(), app[COUNTS].in_flight)
    return [key for key in keys if action.node in (None, key.node) and action.instance in (None, key.instance)]


async def _all_loaded(
    app: web.Application, keys: list[ReplicaKey], job: LoadJob | None, adapter: str | None
) -> ReplicaKey:
    """Waits until one of these engines is loaded, and has the adapter if one is meant. Returns which one.

    Raises:
        Unavailable: a load failed or timed out.
    """
    if adapter is None:
        return await until_loaded(app, keys[0], job)
    engine = app[FLEET].snapshot().engine(keys[0])
    if job is not None or engine is None or not engine.view.loaded:
        keys = [await until_loaded(app, keys[0], job)]
    return await app[ADAPTERS].load_at_one(keys, adapter)


def check_instance(fleet: FleetSnapshot, action: LoadAction) -> None:
    """Raises InvalidRequest if there can be no such instance."""
    if action.instance is None:
        return
    if action.node is None:
        raise InvalidRequest("each neuron names its own instances: name the neuron too (--on, node)", param="node")
    if not usable_node(fleet, action.node).has_instances:
        raise InvalidRequest(f"{action.node} has one engine for each model, leave instance out", param="instance")


def is_meant(action: LoadAction, engine: EngineSnapshot) -> bool:
    return action.node in (None, engine.node.name) and action.instance in (None, engine.instance)


def _coming(fleet: FleetSnapshot, model_id: str, action: LoadAction) -> ReplicaKey:
    """The engine that another caller is loading, where the action wants one."""
    coming = (each for each in fleet.engines(model_id) if each.view.coming and each.node.healthy)
    return next(engine.key for engine in coming if is_meant(action, engine))


async def until_loaded(app: web.Application, key: ReplicaKey, job: LoadJob | None) -> ReplicaKey:
    """Waits for our load of this engine, or for that of another caller. Returns what is loaded.

    Raises:
        Unavailable: the load failed or timed out.
    """
    failure: LoadFailure | None = None
    if job is not None and job.task is not None:
        failure = await asyncio.shield(job.task)
    model_id, node, _ = key
    try:
        if job is not None and job.elsewhere is not None:  # another cortex was faster, and may not have begun yet
            node = job.elsewhere
            key = await _until_begun(app[FLEET], model_id, node)
        if failure is not None:
            raise failure
        await app[LOADER].until_loaded(key)  # ours may have found a load of another caller there
    except NodeRemoved:
        raise removed_error(node, f"loading {model_id!r}") from None
    except LoadFailure as error:
        name = model_id if job is None else job.plan.requested.name
        backoff = app[SCHEDULER].view().backoff(name, node)
        wait = NEURON_DOWN_SECS if backoff is None else until_retry(backoff.until, time.monotonic())
        raise Unavailable(str(error), code=ErrorCode.COLD_LOAD_FAILED, retry_after=wait) from error
    return key


async def _until_begun(fleet: Fleet, model_id: str, name: str) -> ReplicaKey:
    """Waits until another cortex's load shows on this node. Raises LoadFailure."""

    def begun(node: NodeSnapshot) -> list[ReplicaKey]:
        return [each.key for each in node.engines(model_id) if each.view.coming or each.view.servable_now]

    try:
        async with timeout(BEGUN_WITHIN_SECS):
            return begun(await fleet.until(name, lambda node: bool(begun(node))))[0]
    except asyncio.TimeoutError:
        reason = f"loading {model_id!r} failed: another cortex wants to load it on {name} and has not begun"
        raise LoadFailure(reason, BackoffCause.TEMPORARY) from None


def _serving(app: web.Application, model_id: str, action: LoadAction) -> ReplicaKey | None:
    """An engine of the model that is loaded where the action wants one; None if one must be loaded.

    Raises:
        ServiceError: the model cannot be loaded.
    """
    fleet, catalogue = app[FLEET].snapshot(), app[LIVE].catalogue
    profile = catalogue.profile(model_id)
    if action.node is None:
        decision = decide(model_id, catalogue, fleet, app[COUNTS].in_flight)
        if isinstance(decision, Serve):
            return decision.replicas[0]
        failed = any(
            each.node.healthy and each.view.known_status is ModelStatus.FAILED for each in fleet.engines(model_id)
        )
        if isinstance(decision, Refuse) and not failed:
            raise decision.error
        return None
    node = usable_node(fleet, action.node)
    loaded = [each for each in fleet.engines(model_id, node) if each.view.loaded and is_meant(action, each)]
    if model_id in catalogue.adapters:
        if loaded and not any(each.view.max_loras for each in loaded):
            raise without_adapters_error(model_id, catalogue)
        loaded = [each for each in loaded if model_id in each.view.adapters]
    if loaded:
        return loaded[0].key
    if profile is None:
        if model_id not in node.models:
            raise no_such_model_error(model_id, [profile.id for profile in catalogue.models], catalogue)
        return None
    reason = infeasible_reason(profile, node)
    if reason is not None:
        raise Conflict(
            f"{node.name} cannot hold {model_id!r}: {reason}", code=ErrorCode.NO_FEASIBLE_NEURON, param="node"
        )
    return None


async def unload_model(request: web.Request) -> web.Response:
    """Unloads a model from one neuron, or from all that have it. Requests in flight finish first, unless the body says
    `"drain": false`. The answer lists every node's result, even if some failed, and says what becomes of the model."""
    app = request.app
    scheduler, fleet = app[SCHEDULER], app[FLEET].snapshot()
    action = await read_model(request, UnloadAction)
    model_id = app[LIVE].catalogue.resolve(action.model)
    check_instance(fleet, action)
    requested, adapter = app[LIVE].catalogue.requested(model_id), _adapter(app, model_id)
    if action.for_secs is not None and (requested.variant is not None or adapter is not None):
        part = "one variant" if adapter is None else "an adapter"
        raise InvalidRequest(
            f"--for (for_secs) holds back a model, not {part}: leave one of them out", param="for_secs"
        )
    if action.node is not None:
        node = usable_node(fleet, action.node)
        engines = [each for each in fleet.engines(model_id, node) if is_meant(action, each)]
    else:
        engines = [
            engine
            for engine in fleet.engines(model_id)
            if engine.node.healthy and engine.view.known_status is not ModelStatus.UNLOADED
        ]
    if adapter is not None:
        engines = [engine for engine in engines if adapter in engine.view.adapters]
    if not engines and (action.for_secs is None or not _is_known(app, model_id)):
        raise _nothing_to_unload(fleet, model_id, action)
    if is_dry_run(request):
        return _would_unload(app, model_id, engines, action)
    hold = await _hold_back(app, model_id, action)
    unloads = (
        _unload(scheduler, engine.key, drain=action.drain)
        if adapter is None
        else app[ADAPTERS].unload(engine.key, adapter)
        for engine in engines
    )
    errors = await app[SHUTDOWN].unless_begun(_all(unloads))
    results = [_result(engine.key, error) for engine, error in zip(engines, errors, strict=True)]
    failed = next((error for error in errors if error is not None), None)
    if failed is not None:
        raise ServiceError(
            failed.message,
            code=failed.code,
            status=failed.status,
            retry_after=failed.retry_after,
            extra={"results": results, **hold},
        )
    unloaded = list(dict.fromkeys(engine.node.name for engine in engines))
    answer = {"status": "unloaded", "model": model_id, "nodes": unloaded, "results": results}
    return web.json_response({**answer, **after_unload(adapter or requested.model_id, scheduler.view()), **hold})


def _nothing_to_unload(fleet: FleetSnapshot, model_id: str, action: UnloadAction) -> NotFound:
    where = "no healthy neuron has" if action.node is None else f"{action.node} does not have"
    there = [] if action.node is None or action.instance is None else list(fleet.nodes[action.node].instances(model_id))
    if there:
        message = (
            f"{action.node} has no instance {action.instance!r} of {shortened(model_id)!r}, only {', '.join(there)}"
        )
        return NotFound(message, code=ErrorCode.MODEL_NOT_FOUND, param="instance")
    return NotFound(f"{where} {shortened(model_id)!r} loaded", code=ErrorCode.MODEL_NOT_FOUND, param="model")


def _is_known(app: web.Application, model_id: str) -> bool:
    return app[LIVE].catalogue.profile(model_id) is not None or bool(app[FLEET].snapshot().holders(model_id))


async def _hold_back(app: web.Application, model_id: str, action: UnloadAction) -> dict[str, Any]:
    """Begins the hold that the action asks for, before anything is unloaded, so that nothing loads it meanwhile.
    Returns the fields of the answer, once that is written."""
    if action.for_secs is None:
        return {"held_until": None}
    decisions, until = app[DECISIONS], time.time() + action.for_secs
    await decisions.hold_back((model_id, ANY_NODE if action.node is None else action.node), until)
    return {"held_until": until, **({} if decisions.problem is None else {"warning": _not_saved(decisions.problem)})}


def _not_saved(problem: str) -> str:
    return f"will not survive a restart: {problem}"


async def _all(works: Iterable[Awaitable[Result]]) -> list[Result]:
    return await asyncio.gather(*works)


def _result(key: ReplicaKey, error: ServiceError | None) -> dict[str, Any]:
    where = place(key)
    if error is None:
        return {**where, "status": "unloaded"}
    return {**where, "status": "failed", "code": error.code, "error": error.message}


async def _unload(scheduler: Scheduler, key: ReplicaKey, *, drain: bool) -> ServiceError | None:
    """None once the engine is gone, else the error."""
    model_id, node, _ = key
    try:
        await scheduler.unload(key, drain=drain)
    except NeuronRefused as error:
        return UpstreamError(f"{node}: {error.message}", code=ErrorCode.UNLOAD_FAILED)
    except NeuronUnreachable as error:
        return Unavailable(str(error), code=ErrorCode.NEURON_UNAVAILABLE, retry_after=NEURON_DOWN_SECS)
    except (CommandAbandoned, NodeRemoved):
        return removed_error(node, f"unloading {model_id!r}")
    return None


def removed_error(node: str, meanwhile: str) -> Unavailable:
    message = f"{node} was removed from the configuration while {meanwhile}"
    return Unavailable(message, code=ErrorCode.NEURON_UNAVAILABLE, retry_after=NEURON_DOWN_SECS)


async def drain_node(request: web.Request) -> web.Response:
    node = _node_named(request.app[FLEET].snapshot(), request.match_info["name"])
    return await _set_draining(request.app, node.name, draining=True)


async def resume_node(request: web.Request) -> web.Response:
    """Also forgets a drained neuron that has left the configuration."""
    name = request.match_info["name"]
    if name not in request.app[DECISIONS].drained:
        _node_named(request.app[FLEET].snapshot(), name)
    return await _set_draining(request.app, name, draining=False)


async def _set_draining(app: web.Application, name: str, *, draining: bool) -> web.Response:
    """Answers once that is written, so the confirmed state survives a restart."""
    await app[DECISIONS].set_drained(name, draining)
    answer: dict[str, Any] = {"node": name, "draining": draining}
    if (problem := app[DECISIONS].problem) is not None:
        answer["warning"] = _not_saved(problem)
    return web.json_response(answer)


def _node_named(fleet: FleetSnapshot, name: str) -> NodeSnapshot:
    node = fleet.nodes.get(name)
    if node is None:
        names = ", ".join(fleet.nodes) or "none"
        raise NotFound(f"unknown neuron {name!r} (known: {names})", code=ErrorCode.NODE_NOT_FOUND, param="node")
    return node


def usable_node(fleet: FleetSnapshot, name: str) -> NodeSnapshot:
    node = _node_named(fleet, name)
    if not node.healthy:
        raise Unavailable(
            f"{name} is down: {node.last_error}", code=ErrorCode.NEURON_UNAVAILABLE, retry_after=NEURON_DOWN_SECS
        )
    return node
