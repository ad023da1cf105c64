"""`POST /fleet/register`: neurons announce themselves."""

from __future__ import annotations

import asyncio
import hmac

from aiohttp import web

from cortex.api.app_keys import LIVE, REGISTRATIONS
from shared.errors import NotFound, ServiceError, Unauthorized
from shared.http import bearer_token, read_model, reply
from shared.protocol import Registration
from shared.settings import SettingsError


async def register_neuron(request: web.Request) -> web.Response:
    """The neuron is part of the fleet until it has missed three announcements."""
    registrations = request.app[REGISTRATIONS]
    if registrations is None:
        raise NotFound('neurons do not register here: set [discovery] kind = "register" in cortex.toml')
    await _check_token(request)
    return reply(registrations.register(await read_model(request, Registration)))


async def _check_token(request: web.Request) -> None:
    """The tokens are read each time, so that a new one in their file is used at once."""
    try:
        expected = await asyncio.to_thread(request.app[LIVE].config.discovery.registration_tokens)
    except SettingsError as error:
        raise ServiceError(f"the registration token cannot be read: {error}") from error
    given = (bearer_token(request.headers) or "").encode("utf-8", "surrogateescape")
    if not any([hmac.compare_digest(given, token.encode()) for token in expected]):  # noqa: C419 - all take the same time
        raise Unauthorized(
            "registering needs the registration token as bearer token: [discovery] in cortex.toml has it"
        )
