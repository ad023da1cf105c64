"""Who sent a request to the control app."""

from __future__ import annotations

from aiohttp import web

from cortex.accounts.caller import CALLER_HEADER, Caller, from_header


def caller_of(request: web.Request) -> Caller:
    """The caller, as the worker that handed the request on has authenticated it."""
    return from_header(request.headers.get(CALLER_HEADER))
