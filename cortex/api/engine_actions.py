"""Operator actions on engines that are there: sleep, wake and restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from aiohttp import web

from cortex.api.app_keys import ADAPTERS, DECISIONS, FLEET, LIVE, SCHEDULER, SHUTDOWN
from cortex.api.fleet.dry_run import dry_run_answer, is_dry_run
from cortex.api.fleet.view import place
from cortex.api.operator import (
    LoadAction,
    check_instance,
    is_meant,
    removed_error,
    until_loaded,
    usable_node,
)
from cortex.control.loads.operator_plan import (
    after_end,
    end_effects,
    load_effects,
    operator_plan,
    without_engine,
    without_pauses,
)
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot, Reservation
from cortex.fleet.state import NodeRemoved
from cortex.placement.load_plan import LoadPlan
from shared.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unavailable, UpstreamError, shortened
from shared.http import read_model
from shared.protocol import RAM, ErrorCode, ModelStatus
from shared.retry_after import NEURON_DOWN_SECS

_RUNNING = frozenset({ModelStatus.LOADED, ModelStatus.SLEEPING, ModelStatus.FAILED})


class EngineAction(LoadAction):
    """Body of `POST /fleet/sleep` and `/fleet/wake`. Without `node`: on every neuron; without `instance`: all of the
    model's engines there."""


class RestartAction(EngineAction):
    """Body of `POST /fleet/restart`. `drain`: let requests in flight finish first."""

    drain: bool = True


async def sleep_model(request: web.Request) -> web.Response:
    """Puts engines to sleep, after their requests in flight. Answers when they sleep, and says what becomes of the
    model."""
    app, action = request.app, await read_model(request, EngineAction)
    engines = _engines(app, action, frozenset({ModelStatus.LOADED}), "loaded")
    view, name = app[SCHEDULER].view(), app[LIVE].catalogue.resolve(action.model)
    after = after_end(view, engines, name, asleep=True)
    if is_dry_run(request):
        effects = end_effects(view, engines, name, "goes to sleep on", drain=True)
        return dry_run_answer(action.model, [*effects, *after])
    works = (_error_of(each, app[SCHEDULER].sleep(each.key), ErrorCode.SLEEP_FAILED) for each in engines)
    return await _answer(app, action, "sleeping", engines, works, after=after)


async def wake_model(request: web.Request) -> web.Response:
    """Wakes engines. Others may have to go for them, as for a load."""
    app, action = request.app, await read_model(request, EngineAction)
    engines = _engines(app, action, frozenset({ModelStatus.SLEEPING}), "asleep")
    if is_dry_run(request):
        plans = [_wake_plan(app, each) for each in engines]
        effects = [effect for plan in plans for effect in load_effects(plan)]
        return dry_run_answer(action.model, effects, _displaced(plans))
    await _end_holds(app, engines)
    works = (_error_of(each, _wake(app, each), ErrorCode.WAKE_FAILED) for each in engines)
    return await _answer(app, action, "loaded", engines, works)


async def restart_model(request: web.Request) -> web.Response:
    """Ends engines and starts them again on the same neurons. Waits until they are loaded; `?wait=false` answers 202 at
    once."""
    app, action = request.app, await read_model(request, RestartAction)
    engines = _engines(app, action, _RUNNING, "loaded")
    for each in engines:
        _check_comes_back(app, each)
    if is_dry_run(request):
        return _would_restart(app, action, engines)
    await _end_holds(app, engines)
    works = (_error_of(each, _restart(app, each, action.drain), ErrorCode.UNLOAD_FAILED) for each in engines)
    # Not the handler's own work: an engine that has ended must come back even if the client leaves.
    restarting = app[ADAPTERS].in_background(
        _answer(app, action, "loaded", engines, works), name=f"restart {action.model}"
    )
    if request.query.get("wait") == "false":
        where = [{**place(each.key), "status": "restarting"} for each in engines]
        return web.json_response({"status": "restarting", "model": action.model, "results": where}, status=202)
    return await asyncio.shield(restarting)


def _would_restart(app: web.Application, action: RestartAction, engines: list[EngineSnapshot]) -> web.Response:
    """An engine that is loaded keeps its memory; for another one, which holds little or none, others may have to go."""
    view, name = app[SCHEDULER].view(), app[LIVE].catalogue.resolve(action.model)
    effects = end_effects(view, engines, name, "is started again on", drain=action.drain)
    plans = [_restart_plan(app, each) for each in engines if each.view.known_status is not ModelStatus.LOADED]
    if not plans:
        effects.append("Its memory is kept for it: displaces nothing.")
    elif len(plans) < len(engines):
        effects.append("Where it is loaded, its memory is kept for it.")
    effects += [effect for plan in plans for effect in load_effects(plan)]
    return dry_run_answer(action.model, effects, _displaced(plans))


def _engines(
    app: web.Application, action: EngineAction, statuses: frozenset[ModelStatus], wanted: str
) -> list[EngineSnapshot]:
    """The engines that are meant.

    Raises:
        ServiceError: there are none, or they do not act alone.
    """
    fleet, catalogue = app[FLEET].snapshot(), app[LIVE].catalogue
    check_instance(fleet, action)
    node = None if action.node is None else usable_node(fleet, action.node)
    name = catalogue.resolve(action.model)
    if name in catalogue.adapters:
        raise InvalidRequest(f"{shortened(name)!r} is an adapter: name its base, {catalogue.adapters[name].base!r}")
    found = [
        each
        for each in fleet.engines(name, node)
        if each.node.healthy and is_meant(action, each) and each.view.known_status in statuses
    ]
    if not found:
        raise _not_there(fleet, name, node, wanted)
    if any(each.view.group is not None for each in found):
        message = f"{shortened(name)!r} spans several neurons: unload it and load it again instead"
        raise Conflict(message, code=ErrorCode.SLEEP_UNSUPPORTED)
    return found


def _not_there(fleet: FleetSnapshot, name: str, node: NodeSnapshot | None, wanted: str) -> ServiceError:
    reserved, loading = fleet.reservation_of(name), fleet.loading_on(name)
    nodes = {*([reserved.node] if reserved else []), *([loading.node.name] if loading else [])}
    if nodes and (node is None or node.name in nodes):
        message = f"{shortened(name)!r} is being started on {', '.join(sorted(nodes))}: wait until it is loaded"
        return Conflict(message, code=ErrorCode.LOAD_IN_PROGRESS)
    where = "any healthy neuron" if node is None else node.name
    return NotFound(f"{shortened(name)!r} is not {wanted} on {where}", code=ErrorCode.MODEL_NOT_FOUND, param="model")


def _name(app: web.Application, engine: EngineSnapshot) -> str:
    return app[LIVE].catalogue.running(engine.view.id, engine.view.variant).name


def _check_comes_back(app: web.Application, engine: EngineSnapshot) -> None:
    """Raises ServiceError if cortex would not load it again there."""
    name = _name(app, engine)
    if app[LIVE].catalogue.profile(name) is None:
        message = f"cortex could not load {shortened(name)!r} again: it is not in models.toml"
        raise NotFound(message, code=ErrorCode.MODEL_NOT_FOUND, param="model")
    if engine.node.draining:
        message = f"cortex could not load {shortened(name)!r} again: {engine.node.name} is draining, resume it first"
        raise Conflict(message, code=ErrorCode.NO_FEASIBLE_NEURON, param="node")


def _wake_plan(app: web.Application, engine: EngineSnapshot) -> LoadPlan | None:
    view = without_pauses(app[SCHEDULER].view(), engine.view.id)
    return operator_plan(view, _name(app, engine), engine.node.name, engine.instance or None)


def _restart_plan(app: web.Application, engine: EngineSnapshot) -> LoadPlan | None:
    """For the load after the engine's end."""
    view = without_engine(without_pauses(app[SCHEDULER].view(), engine.view.id), engine)
    return operator_plan(view, _name(app, engine), engine.node.name, engine.instance or None)


def _displaced(plans: Iterable[LoadPlan | None]) -> list[str]:
    return [name for plan in plans if plan is not None for name in plan.displaces]


async def _end_holds(app: web.Application, engines: Iterable[EngineSnapshot]) -> None:
    for each in engines:
        await app[DECISIONS].end_holds(each.view.id, each.node.name)


async def _wake(app: web.Application, engine: EngineSnapshot) -> None:
    job = app[SCHEDULER].load(_name(app, engine), engine.node.name, engine.instance or None)
    await until_loaded(app, engine.key, job)


async def _restart(app: web.Application, engine: EngineSnapshot, drain: bool) -> None:
    view = engine.view
    devices = tuple(view.devices) or (RAM,)
    booked = (view.vram_booked_mb or view.vram_used_mb or view.ram_booked_mb or 0) // len(devices)
    reservation = Reservation(view.id, engine.node.name, devices, booked, engine.instance, view.variant)
    job = await app[SCHEDULER].restart(engine.key, _name(app, engine), reservation, drain=drain)
    await until_loaded(app, engine.key, job)


async def _error_of(engine: EngineSnapshot, work: Awaitable[object], code: ErrorCode) -> ServiceError | None:
    """None once the work is done, else its error; `code` for one of a neuron that gives none."""
    node = engine.node.name
    try:
        await work
    except ServiceError as error:
        return error
    except NeuronRefused as refused:
        if refused.status == Conflict.status:
            return Conflict(f"{node}: {refused.message}", code=refused.code or code)
        return UpstreamError(f"{node}: {refused.message}", code=refused.code or code)
    except NeuronUnreachable as error:
        return Unavailable(str(error), code=ErrorCode.NEURON_UNAVAILABLE, retry_after=NEURON_DOWN_SECS)
    except (CommandAbandoned, NodeRemoved):
        return removed_error(node, f"acting on {engine.view.id!r}")
    return None


async def _answer(
    app: web.Application,
    action: EngineAction,
    status: str,
    engines: list[EngineSnapshot],
    works: Iterable[Awaitable[ServiceError | None]],
    *,
    after: Sequence[str] = (),
) -> web.Response:
    """Every engine's result, and what comes after. Raises the first error, with all results, if there is one."""
    errors = await app[SHUTDOWN].unless_begun(_all(works))
    results: list[dict[str, Any]] = [
        {**place(each.key), "status": status}
        if error is None
        else {**place(each.key), "status": "failed", "code": error.code, "error": error.message}
        for each, error in zip(engines, errors, strict=True)
    ]
    failed = next((error for error in errors if error is not None), None)
    if failed is not None:
        failed.extra = {**failed.extra, "results": results}
        raise failed
    following = {"next": " ".join(after)} if after else {}
    return web.json_response({"status": status, "model": action.model, "results": results, **following})


async def _all(works: Iterable[Awaitable[ServiceError | None]]) -> list[ServiceError | None]:
    return await asyncio.gather(*works)
