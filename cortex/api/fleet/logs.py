"""`GET /fleet/logs`: what a model's engines write, wherever they run."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from cortex.api.app_keys import CLIENTS, FLEET, LIVE
from cortex.api.authorization import StreamAccess
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.placement.refusal import no_such_model_error
from cortex.routing.replica import ReplicaKey
from shared.errors import InvalidRequest, NotFound
from shared.http import EVENT_STREAM_HEADERS, KEEP_ALIVE_COMMENT
from shared.serve import CLOSING
from shared.tasks import TaskSet, first_of

DEFAULT_TAIL, MAX_TAIL = 200, 10_000
KEEP_ALIVE_SECS = 15.0
MOST_BEHIND = 20_000
"""Lines that a slow reader has not read yet; more are left out and counted."""
_ACCESS_ENDED = "the API key or session was revoked, has expired, or may not read logs any more"


async def show_logs(request: web.Request) -> web.StreamResponse:
    """The last lines of each engine; with `follow=true` server-sent events, a line in each."""
    engines, tail = _engines(request), _tail(request)
    follow = request.query.get("follow", "false")
    if follow not in ("true", "false"):
        raise InvalidRequest(f"'follow' is {follow!r}; it can be true or false", param="follow")
    if follow == "true":
        return await _follow(request, engines, tail)
    told = await asyncio.gather(*(_last_lines(request.app[CLIENTS][key.node], key, tail) for key in engines))
    return web.json_response({"engines": told})


def _engines(request: web.Request) -> list[ReplicaKey]:
    """The engines that are meant, at least one."""
    name, node, instance = (request.query.get(each) for each in ("model", "node", "instance"))
    if not name:
        raise InvalidRequest("the query parameter 'model' is required", param="model")
    catalogue, fleet = request.app[LIVE].catalogue, request.app[FLEET].snapshot()
    model_id = catalogue.requested(catalogue.resolve(name)).model_id
    keys = [engine.key for engine in fleet.engines(model_id)]
    if not keys and catalogue.profile(model_id) is None:
        raise no_such_model_error(name, [profile.id for profile in catalogue.models], catalogue)
    keys = [key for key in keys if node in (None, key.node) and instance in (None, key.instance)]
    if not keys:
        where = " and ".join(filter(None, (node and f"on {node}", instance and f"as instance {instance!r}")))
        raise NotFound(f"no neuron has had an engine of {model_id!r}{' ' + where if where else ''}", param="model")
    return keys


def _tail(request: web.Request) -> int:
    text = request.query.get("tail", str(DEFAULT_TAIL))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_TAIL)) and int(text) <= MAX_TAIL):
        raise InvalidRequest(f"'tail' is {text!r}; it must be an integer from 0 to {MAX_TAIL}", param="tail")
    return int(text)


def _place(key: ReplicaKey) -> dict[str, str]:
    return {"model": key.model_id, "node": key.node, "instance": key.instance}


async def _last_lines(client: NeuronClient, key: ReplicaKey, tail: int) -> dict[str, Any]:
    try:
        return {**_place(key), "lines": await client.log_lines(key.model_id, key.instance, tail)}
    except (NeuronRefused, NeuronUnreachable) as error:
        return {**_place(key), "lines": [], "error": str(error)}


async def _follow(request: web.Request, engines: list[ReplicaKey], tail: int) -> web.StreamResponse:
    response, access = web.StreamResponse(headers=EVENT_STREAM_HEADERS), StreamAccess(request)
    sources = [(request.app[CLIENTS][key.node], key) for key in engines]  # now: a neuron may leave while we wait
    await response.prepare(request)
    closing, followed, tasks = request.app[CLOSING], _Followed(len(engines)), TaskSet()
    try:
        for client, key in sources:
            _ = tasks.spawn(followed.follow(client, key, tail), name=f"follow {key.name}")
        while followed.goes_on and not closing.is_set():
            waits = {"came": followed.came.wait(), "closing": closing.wait()}
            came = await first_of(waits, timeout_secs=KEEP_ALIVE_SECS)
            if not await access.lasts():  # right before the lines are written: the key may have ended during the wait
                await response.write(_event({"end": _ACCESS_ENDED}))
                break
            await response.write(KEEP_ALIVE_COMMENT if came is None else followed.take())
            if closing.is_set():
                await response.write(_event({"end": "cortex is stopping"}))
    finally:
        await tasks.close()
    return response


class _Followed:
    """The lines of several engines, as events in the order in which they come."""

    def __init__(self, count: int) -> None:
        """`count`: how often `follow` will be called."""
        self.came = asyncio.Event()
        self._events: list[bytes] = []
        self._open = count
        self._left_out = 0

    @property
    def goes_on(self) -> bool:
        return self._open > 0 or bool(self._events)

    async def follow(self, client: NeuronClient, key: ReplicaKey, tail: int) -> None:
        """Adds the engine's lines until it is gone."""
        place = _place(key)
        try:
            await client.follow_log(key.model_id, key.instance, tail, lambda line: self._add({**place, "line": line}))
            self._add({**place, "end": "the engine is gone"})
        except (NeuronRefused, NeuronUnreachable) as error:
            self._add({**place, "end": str(error)})
        finally:
            self._open -= 1
            self.came.set()

    def take(self) -> bytes:
        """What has come since the last call."""
        self.came.clear()
        events, self._events = self._events, []
        if self._left_out:
            events.append(_event({"left_out": self._left_out}))
            self._left_out = 0
        return b"".join(events)

    def _add(self, what: dict[str, Any]) -> None:
        if len(self._events) < MOST_BEHIND:
            self._events.append(_event(what))
        else:
            self._left_out += 1
        self.came.set()


def _event(what: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(what, separators=(",", ":")).encode()
