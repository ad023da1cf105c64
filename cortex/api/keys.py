"""`/keys`: API keys, for admins."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from cortex.accounts.keys.api_key import ApiKey
from cortex.accounts.keys.key_terms import KeyTerms, budget_text
from cortex.accounts.limits.terms import Limits
from cortex.api.app_keys import KEYS
from shared.http import read_model


async def list_keys(request: web.Request) -> web.Response:
    """Without secrets, which are not kept."""
    return web.json_response({"keys": [key_object(key) for key in request.app[KEYS].keys]})


async def create_key(request: web.Request) -> web.Response:
    """201 with the secret in `key`, this once."""
    key, secret = await request.app[KEYS].create(await read_model(request, KeyTerms))
    return web.json_response({**key_object(key), "key": secret}, status=201)


async def revoke_key(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    await request.app[KEYS].revoke(name)
    return web.json_response({"name": name, "revoked": True})


async def rotate_key(request: web.Request) -> web.Response:
    """The new secret in `key`, this once."""
    key, secret = await request.app[KEYS].rotate(request.match_info["name"])
    return web.json_response({**key_object(key), "key": secret})


def key_object(key: ApiKey) -> dict[str, Any]:
    """A key as `/keys` shows it; the limits as `POST /keys` takes them."""
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "role": key.role,
        "models": list(key.models),
        "priority": key.priority,
        "weight": key.weight,
        **_limits_object(key.limits.total),
        "limits": {glob: _limits_object(limits) for glob, limits in key.limits.by_models.items()},
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "source": key.source,
    }


def _limits_object(limits: Limits) -> dict[str, Any]:
    return {
        "rpm": limits.rpm,
        "tpm": limits.tpm,
        "parallel": limits.parallel,
        "budget": [budget_text(budget) for budget in limits.budgets],
    }
