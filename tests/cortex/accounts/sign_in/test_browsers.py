"""A browser signs in at the issuer, uses its session, and signs out. The browser is a client with a cookie jar."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from tests.cortex.accounts.sign_in.small_issuer import SmallIssuer
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import connected, request, until

MODEL = "org/small"
PAGE = {"Accept": "text/html,application/xhtml+xml"}
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Browser:
    """Follows no redirect by itself. Each request has a connection of its own, so that any worker may get it."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def get(self, url: str, **headers: str) -> tuple[int, str, str]:
        """Status, text and location."""
        async with self._http.get(url, headers=PAGE | headers, allow_redirects=False) as answer:
            return answer.status, await answer.text(), answer.headers.get("Location", "")

    async def post(self, url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        async with self._http.post(url, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def to_issuer(self, cortex: str, after: str = "/") -> str:
        """The address at which the issuer sends the browser back to cortex."""
        status, _, there = await self.get(f"{cortex}/login?next={after}")
        assert status == 303
        status, _, back = await self.get(there)
        assert status == 302
        return back

    async def sign_in(self, cortex: str) -> None:
        status, text, _ = await self.get(await self.to_issuer(cortex), **{"Sec-Fetch-Site": "cross-site"})
        assert status == 200, text

    async def until_refused(self, cortex: str, secret: str) -> None:
        """Returns once this session is over: a worker remembers it for a second."""
        status = 200
        while status == 200:
            status, _, _ = await self.get(f"{cortex}/fleet", Cookie=f"cortex_session={secret}")
        assert status == 401

    @property
    def cookies(self) -> dict[str, Any]:
        return {cookie.key: cookie for cookie in self._http.cookie_jar}


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    jar, connector = aiohttp.CookieJar(unsafe=True), aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(cookie_jar=jar, connector=connector) as http:
        yield Browser(http)


@pytest.fixture
async def cortex(
    tmp_path: Path, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> AsyncIterator[CortexProcess]:
    """Two workers, no key."""
    auth = {"oidc": issuer.settings()}
    async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state", workers=2, auth=auth) as cortex:
        yield cortex


async def test_the_life_of_a_session(cortex: CortexProcess, tmp_path: Path, issuer: SmallIssuer) -> None:
    """From the start page to the issuer and back; then every worker knows the session until it is signed out. Neither
    the log nor the database has its secret."""
    url = cortex.url
    async with browser() as alice:
        assert json.loads((await alice.get(f"{url}/dashboard/me"))[1])["name"] is None
        status, text, _ = await alice.get(await alice.to_issuer(url, "/fleet?x=1"), **{"Sec-Fetch-Site": "cross-site"})
        assert (status, 'content="0;url=/fleet?x=1"' in text) == (200, True)
        session = alice.cookies["cortex_session"]
        assert (session["httponly"], session["samesite"], session["secure"]) == (True, "Lax", "")
        assert "cortex_login" not in alice.cookies
        for _ in range(8):
            assert (await alice.get(f"{url}/fleet"))[0] == 200
            assert (await alice.post(f"{url}/v1/chat/completions", BODY))[0] == 200
        assert (await alice.get(f"{url}/"))[0] == 200
        viewer = {"name": "oidc:alice", "role": "viewer", "may_act": False, "may_configure": False, "leaves": True}
        assert json.loads((await alice.get(f"{url}/dashboard/me"))[1]) == viewer
        assert (await alice.get(f"{url}/keys"))[0] == 403
        for origin in ("https://evil.example.com", "http://127.0.0.1:1"):  # of another site, and of this host
            assert (await alice.post(f"{url}/v1/chat/completions", BODY, Origin=origin))[0] == 403
            assert (await alice.post(f"{url}/logout", Origin=origin))[0] == 403
        assert (await alice.post(f"{url}/logout"))[1] == {"signed_out": True}
        assert "cortex_session" not in alice.cookies
        assert json.loads((await alice.get(f"{url}/dashboard/me"))[1])["name"] is None
    stored = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("cortex.db*"))
    assert session.value.encode() not in stored
    assert session.value not in cortex.log()
    async with browser() as thief:  # the cookie alone is worth nothing now
        for _ in range(8):
            await thief.until_refused(url, session.value)


async def test_pages_of_allowed_origins(
    tmp_path: Path, benjy: V1Neuron, engine: RawEngine, issuer: SmallIssuer
) -> None:
    """A browser sends the cookie for them, too, if they are of the same site, such as another port of this host. They
    do not act as the person. cortex's own page does, also behind a proxy that changes the Host."""
    page, own = "http://127.0.0.1:1", "https://ai.example.com"
    auth = {"oidc": issuer.settings(roles={"admin": ["team"]})}
    async with (
        browser() as alice,
        cortex_process(
            tmp_path, [benjy], [{"id": MODEL}], state_dir="state", auth=auth, allowed_origins=[page, own]
        ) as cortex,
    ):
        url = cortex.url
        await alice.sign_in(url)
        assert (await alice.post(f"{url}/fleet/nodes/{benjy.name}/drain", {}, Origin=page))[0] == 401
        assert (await alice.post(f"{url}/v1/chat/completions", BODY, Origin=page))[0] == 401
        assert (await alice.post(f"{url}/logout", Origin=page))[1] == {"signed_out": False}
        for headers in ({"Origin": url}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}):
            assert (await alice.post(f"{url}/fleet/nodes/{benjy.name}/drain", {}, **headers))[0] == 200


async def test_sign_ins_that_fail(cortex: CortexProcess, issuer: SmallIssuer) -> None:
    """Each shows a page that says why, and gives no session."""
    url = cortex.url

    async def fails(back: str, status: int, reason: str, *, at: Browser) -> None:
        found, text, _ = await at.get(back)
        assert (found, reason in text) == (status, True), text
        assert "cortex_session" not in at.cookies

    async with browser() as alice, browser() as mallory:
        back = await alice.to_issuer(url)
        await fails(back, 400, "not the end of a sign-in that this browser has begun", at=mallory)
        await fails(back.replace("state=", "state=x"), 400, "not the end of a sign-in", at=alice)
        back = await alice.to_issuer(url)
        await fails(f"{url}/login/callback?state={_state(back)}", 400, "no code", at=alice)
        back = await alice.to_issuer(url)
        await fails(f"{url}/login/callback?state={_state(back)}&code=guessed", 400, "unknown code", at=alice)
        issuer.refusal = "access_denied"
        await fails(await alice.to_issuer(url), 400, "access_denied", at=alice)
        issuer.refusal, issuer.person["groups"] = None, ["<b>strangers</b>"]
        await fails(await alice.to_issuer(url), 403, "groups are &lt;b&gt;strangers&lt;/b&gt;", at=alice)
        issuer.person |= {"groups": ["team"], "nonce": "another"}
        back = await alice.to_issuer(url)
        issuer.codes[parse_qs(urlsplit(back).query)["code"][0]]["nonce"] = "another"
        await fails(back, 400, "token is of another sign-in", at=alice)
        del issuer.person["nonce"]
        back = await alice.to_issuer(url)
        journey = alice.cookies["cortex_login"].value
        assert (await alice.get(back))[0] == 200
        async with browser() as again:  # the same address once more, also with the cookie of that sign-in
            await fails(back, 400, "not the end of a sign-in", at=again)
            found, text, _ = await again.get(back, Cookie=f"cortex_login={journey}")
            assert (found, "unknown code" in text) == (400, True)


async def test_cookies_that_are_not_text(cortex: CortexProcess) -> None:
    """They are those of no session and no sign-in."""
    for method, target, cookie, status in (
        ("GET", "/login/callback?state=x&code=x", b"cortex_login=\xff.a.b.c", 400),
        ("POST", "/logout", b"cortex_session=cortex-session-\xff", 200),
    ):
        async with connected(cortex.url) as client:
            sent = request(b"", "Cookie: COOKIE", method=method, target=target).replace(b"COOKIE", cookie)
            assert (await client.ask(sent, method)).status == status


def _state(url: str) -> str:
    return parse_qs(urlsplit(url).query)["state"][0]


async def test_where_a_sign_in_leads(cortex: CortexProcess, issuer: SmallIssuer) -> None:
    """Only to paths of this cortex."""
    for after, target in (
        ("//evil.example.com", "/"),
        ("/%5Cevil.example.com", "/"),
        ("https://evil.example.com", "/"),
        ("/usage%22%3E", "/usage&quot;&gt;"),
        ("/usage?group_by=model", "/usage?group_by=model"),
    ):
        async with browser() as alice:
            _, text, _ = await alice.get(await alice.to_issuer(cortex.url, after))
            assert f'content="0;url={target}"' in text, after


async def test_programs_get_no_redirect(cortex: CortexProcess) -> None:
    """Only a browser that asks for a page is sent to the issuer."""
    async with browser() as client:
        for accept in ("*/*", "application/json"):
            assert (await client.get(f"{cortex.url}/", Accept=accept))[0] == 200  # JSON
            assert (await client.get(f"{cortex.url}/fleet", Accept=accept))[0] == 401
        assert (await client.get(f"{cortex.url}/login/settings"))[0] == 200


async def test_while_the_issuer_is_down(tmp_path: Path, benjy: V1Neuron, engine: RawEngine) -> None:
    """Sessions go on, also over a restart of cortex; a sign-in shows why it is not possible."""
    issuer = SmallIssuer()
    async with browser() as alice:
        async with issuer.running():
            auth = {"oidc": issuer.settings()}
            async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state", auth=auth) as cortex:
                await alice.sign_in(cortex.url)
        async with cortex_process(tmp_path, [benjy], [{"id": MODEL}], state_dir="state", auth=auth) as cortex:
            assert (await alice.get(f"{cortex.url}/fleet"))[0] == 200
            status, text, _ = await alice.get(f"{cortex.url}/login")
            assert (status, f"the issuer {issuer.url} cannot be used" in text) == (503, True)
            async with issuer.running(int(issuer.url.rpartition(":")[2])):
                status = 503
                while status == 503:  # cortex asks a dead issuer again after five seconds
                    await asyncio.sleep(0.1)
                    status, _, _ = await alice.get(f"{cortex.url}/login")
                assert status == 303


async def test_expired_sessions(tmp_path: Path, benjy: V1Neuron, issuer: SmallIssuer) -> None:
    """One that has ended by time is not accepted, and the next sign-in removes it."""
    auth = {"oidc": issuer.settings()}
    async with (
        browser() as alice,
        cortex_process(tmp_path, [benjy], [], state_dir="state", auth=auth) as cortex,
    ):
        await alice.sign_in(cortex.url)
        with contextlib.closing(sqlite3.connect(tmp_path / "state/cortex.db")) as database:
            database.execute("UPDATE sessions SET expires_at = 1")
            database.commit()
        assert (await alice.get(f"{cortex.url}/fleet"))[0] == 401
        await alice.sign_in(cortex.url)
        with contextlib.closing(sqlite3.connect(tmp_path / "state/cortex.db")) as database:
            assert database.execute("SELECT name, groups FROM sessions").fetchall() == [("alice", '["team"]')]


async def test_without_a_database(tmp_path: Path, benjy: V1Neuron, issuer: SmallIssuer) -> None:
    """Tokens are accepted; a browser is told what is missing. Behind a proxy that ends TLS the cookie is for TLS."""
    auth = {"oidc": issuer.settings()}
    (tmp_path / "file").write_text("not a directory")
    async with (
        browser() as alice,
        cortex_process(tmp_path, [benjy], [], state_dir="file/state", auth=auth) as cortex,
    ):
        status, text, _ = await alice.get(f"{cortex.url}/login")
        assert (status, "has no database that it can write" in text) == (503, True)
        token = issuer.token()
        assert (await alice.get(f"{cortex.url}/fleet", Authorization=f"Bearer {token}"))[0] == 200


async def test_behind_a_proxy(tmp_path: Path, benjy: V1Neuron, issuer: SmallIssuer) -> None:
    """The redirect URL and the cookies follow what the proxy says of the browser's connection."""
    auth = {"oidc": issuer.settings()}
    async with (
        browser() as alice,
        cortex_process(tmp_path, [benjy], [], state_dir="state", auth=auth, allowed_hosts=["ai.example.com"]) as cortex,
    ):
        headers = {"Host": "ai.example.com"}
        for said, scheme in (("http", "http"), ("https", "https"), ("https, https", "https")):
            headers["X-Forwarded-Proto"] = said
            _, _, there = await alice.get(f"{cortex.url}/login", **headers)
            assert parse_qs(urlsplit(there).query)["redirect_uri"] == [f"{scheme}://ai.example.com/login/callback"]
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{cortex.url}/login", headers=headers, allow_redirects=False) as answer,
        ):
            assert "Secure" in answer.headers["Set-Cookie"]
        assert (await alice.get(f"{cortex.url}/login", Host="evil.example.com"))[0] == 403


async def test_signing_out_while_the_database_fails(tmp_path: Path, benjy: V1Neuron, issuer: SmallIssuer) -> None:
    """The browser is told that the session could not be deleted, and has it no more. Neither has anyone else: cortex
    refuses it, and deletes it as soon as it can."""
    auth = {"oidc": issuer.settings()}
    async with (
        browser() as alice,
        cortex_process(tmp_path, [benjy], [], state_dir="state", auth=auth) as cortex,
    ):
        await alice.sign_in(cortex.url)
        secret = alice.cookies["cortex_session"].value
        with contextlib.closing(sqlite3.connect(tmp_path / "state/cortex.db", isolation_level=None)) as database:
            database.execute("CREATE TRIGGER full BEFORE DELETE ON sessions BEGIN SELECT RAISE(FAIL, 'is full'); END")
            status, answer = await alice.post(f"{cortex.url}/logout")
            assert (status, answer["error"]["code"]) == (503, "database_unavailable")
            assert "refuses the session from now on" in answer["error"]["message"]
            assert "cortex_session" not in alice.cookies
            async with browser() as thief:
                await thief.until_refused(cortex.url, secret)
            assert database.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
            database.execute("DROP TRIGGER full")
            await until(lambda: database.execute("SELECT count(*) FROM sessions").fetchone() == (0,), secs=600)


async def test_two_cortexes(
    tmp_path: Path, benjy: V1Neuron, issuer: SmallIssuer, new_postgresql: Callable[[], str]
) -> None:
    """With one PostgreSQL: signed in at one, known at the other at once; signed out there, gone here."""
    for name in "ab":
        (tmp_path / name).mkdir()
    more: dict[str, Any] = {"state_dir": "state", "auth": {"oidc": issuer.settings()}, "database": new_postgresql()}
    async with (
        browser() as alice,
        cortex_process(tmp_path / "a", [benjy], [], **more) as one,
        cortex_process(tmp_path / "b", [benjy], [], **more) as other,
    ):
        await alice.sign_in(one.url)
        secret = alice.cookies["cortex_session"].value
        assert (await alice.get(f"{other.url}/fleet"))[0] == 200
        assert (await alice.post(f"{other.url}/logout"))[1] == {"signed_out": True}
        async with browser() as thief:
            await thief.until_refused(one.url, secret)
