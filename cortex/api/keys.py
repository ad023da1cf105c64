"""`/keys`: API keys, for admins."""

from __future__ import annotations

from aiohttp import web

from cortex.accounts.keys.key_terms import KeyTerms, key_object
from cortex.accounts.keys.unmatched_globs import unmatched_globs
from cortex.api.app_keys import KEYS, LIVE
from shared.http import read_model


async def list_keys(request: web.Request) -> web.Response:
    """Without secrets, which are not kept."""
    return web.json_response({"keys": [key_object(key) for key in request.app[KEYS].keys]})


async def create_key(request: web.Request) -> web.Response:
    """201 with the secret in `key`, this once."""
    terms = await read_model(request, KeyTerms)
    key, secret = await request.app[KEYS].create(terms)
    warnings = unmatched_globs(terms, request.app[LIVE].catalogue)
    return web.json_response({**key_object(key), "key": secret, "warnings": warnings}, status=201)


async def revoke_key(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    await request.app[KEYS].revoke(name)
    return web.json_response({"name": name, "revoked": True})


async def rotate_key(request: web.Request) -> web.Response:
    """The new secret in `key`, this once."""
    key, secret = await request.app[KEYS].rotate(request.match_info["name"])
    return web.json_response({**key_object(key), "key": secret})
