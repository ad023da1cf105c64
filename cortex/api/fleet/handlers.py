"""`/fleet` and `/health`: the state of the fleet for operators, once or as it changes, and `explain`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
from aiohttp import web

from cortex.api.app_keys import COUNTS, FLEET, SCHEDULER, SHUTDOWN, TIMELINE
from cortex.api.authorization import StreamAccess
from cortex.api.fleet.changes import FLEET_CHANGES
from cortex.api.fleet.view import FLEET_VIEW, MIN_INTERVAL_SECS
from cortex.control.explain import explain
from cortex.fleet.timeline.timeline import HOURS
from shared.errors import InvalidRequest
from shared.http import EVENT_STREAM_HEADERS, KEEP_ALIVE_COMMENT
from shared.serve import CLOSING
from shared.tasks import first_of, timeout

KEEPALIVE_SECS = 15.0


async def show_fleet(request: web.Request) -> web.Response:
    return web.Response(body=request.app[FLEET_VIEW].body(), content_type="application/json", charset="utf-8")


async def fleet_events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: the fleet now and after every change, at most one per MIN_INTERVAL_SECS; with `changes=true`
    the fleet once and then what changes, at most one per TICK_SECS."""
    changes = request.query.get("changes", "false")
    if changes not in ("true", "false"):
        raise InvalidRequest(f"'changes' is {changes!r}; it can be true or false", param="changes")
    response, access = web.StreamResponse(headers=EVENT_STREAM_HEADERS), StreamAccess(request)
    await response.prepare(request)
    await (_send_changes if changes == "true" else _send_views)(request.app, response, access)
    return response


async def _send_views(app: web.Application, response: web.StreamResponse, access: StreamAccess) -> None:
    fleet, view, closing = app[FLEET], app[FLEET_VIEW], app[CLOSING]
    while await access.lasts() and not closing.is_set():
        version, event = view.event()
        await response.write(event)
        await _closing_within(MIN_INTERVAL_SECS, closing)
        while fleet.version == version and await access.lasts() and not closing.is_set():
            if not await _change_or_closing(fleet.changed_since(version), closing):
                await response.write(KEEP_ALIVE_COMMENT)


async def _send_changes(app: web.Application, response: web.StreamResponse, access: StreamAccess) -> None:
    changes, closing = app[FLEET_CHANGES], app[CLOSING]
    with changes.listening():
        place, events = changes.since(None)
        while await access.lasts() and not closing.is_set():
            await response.write(events)
            if await _change_or_closing(changes.beyond(place), closing):
                place, events = changes.since(place)
            else:
                events = KEEP_ALIVE_COMMENT


async def _closing_within(secs: float, closing: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        async with timeout(secs):
            await closing.wait()


async def _change_or_closing(change: Coroutine[Any, Any, Any], closing: asyncio.Event) -> bool:
    """Waits for a change or the shutdown. False if neither happens within KEEPALIVE_SECS."""
    return await first_of({"change": change, "closing": closing.wait()}, timeout_secs=KEEPALIVE_SECS) is not None


async def explain_model(request: web.Request) -> web.Response:
    scheduler, counts = request.app[SCHEDULER], request.app[COUNTS]
    name = request.query.get("model")
    if not name:
        raise InvalidRequest("the query parameter 'model' is required", param="model")
    return web.json_response(explain(name, scheduler.view(), counts.in_flight))


async def show_timeline(request: web.Request) -> web.Response:
    now = time.time()
    since, until = (_unix_time(request, *each) for each in (("from", now - HOURS * 3600), ("to", now)))
    body = {"from": since, "to": until, **request.app[TIMELINE].between(since, until)}
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", charset="utf-8")


def _unix_time(request: web.Request, name: str, default: float) -> float:
    text = request.query.get(name)
    try:
        secs = default if text is None else float(text)
    except ValueError:
        secs = math.nan
    if not math.isfinite(secs):
        raise InvalidRequest(f"{name!r} is {text!r}; it must be a Unix time in seconds", param=name)
    return secs


async def health(request: web.Request) -> web.Response:
    """200 while a neuron is healthy (`degraded` if one is not), 503 otherwise and while stopping."""
    fleet, stops = request.app[FLEET].snapshot(), request.app[SHUTDOWN].begun
    healthy, total = len(fleet.healthy), len(fleet.nodes)
    status = "ok" if healthy == total and total and not stops else "degraded"
    body = {"status": status, "nodes": {"healthy": healthy, "total": total}}
    return web.json_response(body, status=200 if healthy and not stops else 503)
