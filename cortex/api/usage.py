"""`/usage`, `/usage/energy`, and OpenAI's routes for usage and costs: what was used, by whom, and what it cost."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from cortex.accounts.caller import may
from cortex.accounts.usage.organization import Kind, bucket_page, parse_bucket_query
from cortex.accounts.usage.query import Query, parse_energy_query, parse_query, seen_by
from cortex.api.app_keys import FLEET, LIVE, STORAGE, USAGE_REPORTS
from cortex.api.authorization import caller_of
from cortex.metrics.energy import unmetered
from shared.errors import InvalidRequest, shortened

_INCOMPLETE = "usage cannot be written now, so the latest requests are missing here: `cortex status` says why"


async def show_usage(request: web.Request) -> web.Response:
    """The sums of each group, and of all."""
    query = _visible(request, parse_query(_parameters(request), time.time()))
    reports, config = request.app[USAGE_REPORTS], request.app[LIVE].config
    currency, price = config.usage.currency, config.energy.price_per_kwh
    rows, totals = await reports.reports([query, replace(query, group_by=())], currency)
    return json_response(
        {
            "object": "usage",
            "from": query.since,
            "to": query.until,
            "group_by": query.group_by,
            "currency": currency,
            "rows": [_with_energy_cost(row, price) for row in rows],
            "totals": _with_energy_cost(totals[0], price),
            "warnings": [_INCOMPLETE] if request.app[STORAGE].is_failing else [],
        }
    )


async def show_energy(request: web.Request) -> web.Response:
    """What the meters of the GPUs have counted, by what it was used for: the sums of each group, and of all."""
    query = _visible(request, parse_energy_query(_parameters(request), time.time()))
    config = request.app[LIVE].config
    rows, totals = await request.app[USAGE_REPORTS].energy([query, replace(query, group_by=())])
    price, nodes = config.energy.price_per_kwh, request.app[FLEET].snapshot().nodes.values()
    shown = [node for node in nodes if not query.nodes or node.name in query.nodes]
    return json_response(
        {
            "object": "energy",
            "from": query.since,
            "to": query.until,
            "group_by": query.group_by,
            "currency": config.usage.currency,
            "rows": [_with_energy_cost(row, price) for row in rows],
            "totals": _with_energy_cost(totals[0], price),
            "unmetered": unmetered(shown) if may(caller_of(request).role, "viewer") else [],
        }
    )


def json_response(report: dict[str, Any]) -> web.Response:
    """It may be long: msgspec takes a tenth of the time of Python's encoder."""
    return web.Response(body=msgspec.json.encode(report), content_type="application/json", charset="utf-8")


def _with_energy_cost(row: dict[str, Any], price_per_kwh: float) -> dict[str, Any]:
    """The row, with what its energy costs at this price."""
    row["energy_cost"] = row["energy_wh"] / 1000 * price_per_kwh
    return row


async def organization_completions(request: web.Request) -> web.Response:
    return json_response(await _buckets(request, "completions"))


async def organization_embeddings(request: web.Request) -> web.Response:
    return json_response(await _buckets(request, "embeddings"))


async def organization_costs(request: web.Request) -> web.Response:
    return json_response(await _buckets(request, "costs"))


async def _buckets(request: web.Request, kind: Kind) -> dict[str, Any]:
    asked = parse_bucket_query(kind, _parameters(request), time.time())
    currency = request.app[LIVE].config.usage.currency
    rows = await request.app[USAGE_REPORTS].reports([_visible(request, asked.query)], currency)
    return bucket_page(asked, rows[0], currency)


def _parameters(request: web.Request) -> list[tuple[str, str]]:
    given = list(request.query.items())
    for name, value in given:
        if "\0" in value:  # PostgreSQL cannot compare it
            raise InvalidRequest(f"{shortened(name)} must not contain a NUL character", param=shortened(name))
    return given


def _visible(request: web.Request, query: Query) -> Query:
    """The query as the request's caller may ask it."""
    return seen_by(caller_of(request), query)
