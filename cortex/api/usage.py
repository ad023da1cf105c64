"""`/usage`, and OpenAI's routes for usage and costs: what was used, by whom, and what it cost."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from aiohttp import web

from cortex.accounts.usage.organization import Kind, bucket_page, parse_bucket_query
from cortex.accounts.usage.query import UsageQuery, parse_query, seen_by
from cortex.api.app_keys import LIVE, USAGE_REPORTS
from cortex.api.authorization import caller_of


async def show_usage(request: web.Request) -> web.Response:
    """The sums of each group, and of all."""
    query = _visible(request, parse_query(list(request.query.items()), time.time()))
    reports, config = request.app[USAGE_REPORTS], request.app[LIVE].config
    currency, price = config.usage.currency, config.energy.price_per_kwh
    rows, totals = await reports.reports([query, replace(query, group_by=())], currency)
    return web.json_response(
        {
            "object": "usage",
            "from": query.since,
            "to": query.until,
            "group_by": query.group_by,
            "currency": currency,
            "rows": [_with_energy_cost(row, price) for row in rows],
            "totals": _with_energy_cost(totals[0], price),
        }
    )


def _with_energy_cost(row: dict[str, Any], price_per_kwh: float) -> dict[str, Any]:
    """A row with what its energy costs at this price."""
    return {**row, "energy_cost": row["energy_wh"] / 1000 * price_per_kwh}


async def organization_completions(request: web.Request) -> web.Response:
    return web.json_response(await _buckets(request, "completions"))


async def organization_embeddings(request: web.Request) -> web.Response:
    return web.json_response(await _buckets(request, "embeddings"))


async def organization_costs(request: web.Request) -> web.Response:
    return web.json_response(await _buckets(request, "costs"))


async def _buckets(request: web.Request, kind: Kind) -> dict[str, Any]:
    asked = parse_bucket_query(kind, request.query.items(), time.time())
    currency = request.app[LIVE].config.usage.currency
    rows = await request.app[USAGE_REPORTS].reports([_visible(request, asked.query)], currency)
    return bucket_page(asked, rows[0], currency)


def _visible(request: web.Request, query: UsageQuery) -> UsageQuery:
    """The query as the request's caller may ask it."""
    return seen_by(caller_of(request), query)
