"""`GET /fleet/requests`: live and recent requests, where each went and why, and what it waited for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import msgspec
from aiohttp import web

from cortex.accounts.caller import Caller, may
from cortex.api.app_keys import REQUESTS, TIMELINE
from cortex.api.authorization import caller_of
from cortex.metrics.counters import UNKNOWN
from cortex.metrics.requests.entries import EndedRequest, LiveRequest
from cortex.metrics.requests.filter import RequestFilter
from cortex.metrics.requests.waterfall import SpansByModel, waterfall
from cortex.proxy.progress.account import CLIENT_DISCONNECTED
from shared.errors import Forbidden, InvalidRequest, shortened

DEFAULT_REQUESTS, MOST_REQUESTS = 100, 1000


async def show_requests(request: web.Request) -> web.Response:
    asked, limit = _filter(request), _limit(request)
    now = await request.app[REQUESTS].since(request.query.get("since"), asked, limit)
    ended = list(islice((each for each in now.ended if _fits(asked, each)), limit))
    spans = _spans(request, ended, now.live)
    body = {
        "place": now.place,
        "whole": now.whole,
        "live_count": now.live_count,
        "live": [_live(each, spans) for each in now.live],
        "ended": [_ended(each, spans) for each in ended],
    }
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", charset="utf-8")


def _fits(asked: RequestFilter, each: EndedRequest) -> bool:
    """An error is asked for with the status "error". A client that has left is not one."""
    record, status = each.record, asked.status
    if not asked.fits(record.key_id, record.key, (record.model, each.asked), record.node, each.attempts):
        return False
    if status == "error":
        return record.status != CLIENT_DISCONNECTED and (bool(each.error) or record.status >= 400)
    return status in (None, str(record.status))


def _filter(request: web.Request) -> RequestFilter:
    caller, query = caller_of(request), request.query
    status = query.get("status")
    if status is not None and status != "error" and not (status.isascii() and status.isdigit() and len(status) == 3):
        raise InvalidRequest(
            f"'status' is {shortened(status)!r}; it can be error or an HTTP status such as 503", param="status"
        )
    return RequestFilter(_own(caller), query.get("model"), query.get("key"), query.get("node"), status)


def _own(caller: Caller) -> str | None:
    """The id of the only key whose requests the caller may see; None for a viewer, who sees all.

    Raises:
        Forbidden: it has no key.
    """
    if may(caller.role, "viewer"):
        return None
    if not caller.key_id:
        raise Forbidden("without an API key there are no requests of your own; those of all need the role viewer")
    return caller.key_id


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_REQUESTS))
    fits = text.isascii() and text.isdigit() and len(text) <= len(str(MOST_REQUESTS))
    if not fits or not 1 <= int(text) <= MOST_REQUESTS:
        raise InvalidRequest(
            f"'limit' is {shortened(text)!r}; it must be an integer from 1 to {MOST_REQUESTS}", param="limit"
        )
    return int(text)


def _spans(request: web.Request, ended: Iterable[EndedRequest], live: Iterable[LiveRequest]) -> SpansByModel:
    """What the timeline has of the time in which these requests waited."""
    waited = [each.record.ended_at - each.record.secs for each in ended if each.waits]
    waited += [each.since for each in live if each.waits]
    if not waited:
        return SpansByModel(())
    return SpansByModel(request.app[TIMELINE].between(min(waited), time.time())["spans"])


def _ended(each: EndedRequest, spans: SpansByModel) -> dict[str, Any]:
    record = each.record
    model = each.asked if record.model == UNKNOWN else record.model
    started = record.ended_at - record.secs
    return {
        "id": record.request_id,
        "started": started,
        "key": record.key,
        "model": model,
        "asked": each.asked,
        "variant": record.variant,
        "node": record.node,
        "instance": record.instance,
        "path": record.path,
        "status": record.status,
        "error": each.error or None,
        "message": each.message or None,
        "streamed": each.streamed,
        "complete": record.complete,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queued_secs": record.queued_secs,
        "first_byte_secs": record.first_byte_secs,
        "secs": record.secs,
        "cold": record.cold,
        "choice": each.choice or None,
        "attempts": each.attempts or (),
        "steps": waterfall(
            record.model,
            started,
            record.secs,
            spans,
            node=record.node,
            first_byte_secs=record.first_byte_secs,
            attempts=each.attempts or (),
            waits=each.waits or (),
        ),
    }


def _live(each: LiveRequest, spans: SpansByModel) -> dict[str, Any]:
    waits: Sequence[tuple[float, float]] = each.waits
    return {
        "id": each.request_id,
        "started": each.since,
        "key": each.key,
        "model": each.model,
        "asked": each.asked,
        "variant": each.variant,
        "node": each.node,
        "instance": each.instance,
        "path": each.path,
        "stage": each.stage,
        "note": each.note or None,
        "streamed": each.streamed,
        "queued_secs": sum(until - since for since, until in waits),
        "first_byte_secs": each.first_byte_secs,
        "secs": each.secs,
        "cold": each.cold,
        "choice": each.choice or None,
        "attempts": each.attempts,
        "steps": waterfall(
            each.model,
            each.since,
            each.secs,
            spans,
            node=each.node,
            first_byte_secs=each.first_byte_secs,
            attempts=each.attempts,
            waits=waits,
        ),
    }
