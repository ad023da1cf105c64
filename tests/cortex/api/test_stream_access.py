"""How long a caller keeps a stream that does not end."""

from __future__ import annotations

import aiohttp
from aiohttp import web

from cortex.accounts.caller import Caller, shown_caller
from cortex.accounts.keys.key_ring import KeyRing
from cortex.api.app_keys import KEYS
from cortex.api.authorization import StreamAccess
from cortex.http.headers import CALLER_NAME
from shared.serve import Site, bind, serving

KEY = '[[keys]]\nname = "{0}"\nkey = "sk-{0}"\nrole = "viewer"\n{1}\n'


async def test_a_key_that_expires_before_its_stream_begins() -> None:
    """The worker still knew it. Unlike those that have no key, it does not keep the stream."""
    app = web.Application()
    environ = {"CORTEX_KEYS": KEY.format("late", "expires = 2020-01-01") + KEY.format("good", "")}
    app[KEYS] = KeyRing(environ=environ)

    async def lasts(request: web.Request) -> web.Response:
        return web.json_response(await StreamAccess(request).lasts())

    app.router.add_get("/fleet/events", lasts)
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/fleet/events"
    person = shown_caller(Caller("oidc:1", "oidc:alice", "viewer")).decode()
    async with serving([Site(app, sock)], drain_timeout_secs=0), aiohttp.ClientSession() as http:
        for name, expected in (("env:good", True), ("env:late", False), ("anonymous", True), (person, True)):
            async with http.get(url, headers={CALLER_NAME.decode(): name}) as answer:
                assert (await answer.json()) is expected, name
