"""How long signed-in people keep a stream that does not end, and how a session ends while the database fails."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from cortex.accounts.caller import Caller, shown_caller
from cortex.accounts.database.database import open_database
from cortex.accounts.database.source import DatabaseError, database_source
from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.sign_in import sign_in as sign_in_module
from cortex.accounts.sign_in.issuer import Issuer
from cortex.accounts.sign_in.person import SESSION_PREFIX, Person
from cortex.accounts.sign_in.sessions import Sessions
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.api.app_keys import KEYS, SIGN_IN
from cortex.api.authorization import StreamAccess
from cortex.config.sign_in import OidcSettings
from cortex.http.headers import CALLER_NAME
from shared.errors import Unauthorized, Unavailable
from shared.serve import Site, bind, serving
from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer

ALICE = shown_caller(Caller("oidc:1001", "oidc:alice", "viewer")).decode()


class SignedIn:
    """A sign-in, and whether a stream that alice opened before a change lasts after it."""

    def __init__(self, issuer: SmallIssuer, sessions: Sessions) -> None:
        self._issuer, self.sessions = issuer, sessions
        self.settings = OidcSettings.model_validate(issuer.settings())
        self.sign_in = SignIn(lambda: self.settings, Issuer(self.settings), sessions)

    async def other_roles(self) -> None:
        """A reload that leaves alice's role."""
        self._configure({"viewer": ["team"], "admin": ["others"]})

    async def lower_role(self) -> None:
        self._configure({"user": ["team"]})

    def _configure(self, roles: dict[str, list[str]]) -> None:
        self.settings = OidcSettings.model_validate(self._issuer.settings(roles=roles))

    async def lasts(self, change: Callable[[], Awaitable[None]], **credential: str) -> bool:
        app = web.Application()
        app[KEYS], app[SIGN_IN] = KeyRing(environ={}), self.sign_in

        async def stream(request: web.Request) -> web.Response:
            access = StreamAccess(request)
            assert await access.lasts()
            await change()
            return web.json_response(await access.lasts())

        app.router.add_get("/fleet/events", stream)
        sock = bind("127.0.0.1", 0)
        url, headers = f"http://127.0.0.1:{sock.getsockname()[1]}/fleet/events", {CALLER_NAME.decode(): ALICE}
        async with (
            serving([Site(app, sock)], drain_timeout_secs=0),
            aiohttp.ClientSession() as http,
            http.get(url, headers=headers | credential) as answer,
        ):
            return bool(await answer.json())


@pytest.fixture
async def signed_in(tmp_path: Path, issuer: SmallIssuer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SignedIn]:
    """A session is looked up each time instead of each second."""
    monkeypatch.setattr(sign_in_module, "SESSION_KEPT_SECS", 0.0)
    source = database_source(None, tmp_path)
    assert source is not None
    database = await open_database(source)
    found = SignedIn(issuer, Sessions(database))
    yield found
    await found.sign_in.close()
    await database.close()


async def test_made_up_secrets_keep_no_session_alive(signed_in: SignedIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone can sign out with them. While the database cannot be written, cortex remembers only real sessions."""

    async def full(self: Sessions, secret: bytes) -> None:
        raise DatabaseError("the disk is full")

    monkeypatch.setattr(Sessions, "end", full)
    monkeypatch.setattr(sign_in_module, "_MOST_LEFT", 1)
    now = time.time()
    session = (await signed_in.sessions.begin(Person("1001", "alice", ("team",)), now, now + 60)).encode()
    for secret in (session, SESSION_PREFIX + b"made-up"):
        with pytest.raises(Unavailable):
            await signed_in.sign_in.leave(secret)
    with pytest.raises(Unauthorized):
        await signed_in.sign_in.identify(session)


async def test_with_a_session(signed_in: SignedIn) -> None:
    """Until it is signed out, or its person loses the role."""
    now = time.time()
    secret = await signed_in.sessions.begin(Person("1001", "alice", ("team",)), now, now + 3600)
    cookie = {"Cookie": f"cortex_session={secret}"}

    async def signs_out() -> None:
        await signed_in.sign_in.leave(secret.encode())

    assert await signed_in.lasts(signed_in.other_roles, **cookie)
    assert not await signed_in.lasts(signed_in.lower_role, **cookie)
    await signed_in.other_roles()
    assert not await signed_in.lasts(signs_out, **cookie)


async def test_with_a_token(signed_in: SignedIn, issuer: SmallIssuer) -> None:
    """Until its person loses the role. That it expires does not end what has begun."""
    valid, expired = ({"Authorization": f"Bearer {issuer.token(exp=time.time() + secs)}"} for secs in (300, -300))

    async def nothing() -> None:
        pass

    assert await signed_in.lasts(nothing, **expired)
    assert await signed_in.lasts(signed_in.other_roles, **valid)
    assert not await signed_in.lasts(signed_in.lower_role, **valid)
