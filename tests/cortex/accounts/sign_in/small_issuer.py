"""A small issuer of OpenID Connect on loopback: signs real tokens, and is as strict about codes and PKCE as real ones.

The person in front of the browser agrees to everything at once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from aiohttp import web
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from shared.serve import Site, bind, serving

CLIENT_ID = "cortex"
CLIENT_SECRET = "the secret/of cortex"
ROLES = {"admin": ["ops"], "viewer": ["team"], "user": ["guests"]}


def new_key(name: str) -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": name, "use": "sig", "alg": "RS256"})


@dataclass
class SmallIssuer:
    """`person`: the claims about the person. `refusal`: what `/authorize` answers instead of a code. `approved`:
    whether device codes are; `asked`: set once a device has asked for its tokens. `document`: what `/keys` answers
    instead of the keys."""

    url: str = ""
    person: dict[str, Any] = field(
        default_factory=lambda: {"sub": "1001", "preferred_username": "alice", "groups": ["team"]}
    )
    key: RSAKey | ECKey = field(default_factory=lambda: new_key("first"))
    published: list[Any] = field(default_factory=list)
    document: Any = None
    refusal: str | None = None
    approved: bool = False
    offers_device: bool = True
    secret: str | None = CLIENT_SECRET
    fetches: int = 0
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    device_codes: set[str] = field(default_factory=set)
    refresh_tokens: set[str] = field(default_factory=set)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    token_secs: float = 300.0

    def __post_init__(self) -> None:
        self.published.append(self.key)

    def token(self, *, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A signed token of the person; claims without a value are left out."""
        key, now = key or self.key, time.time()
        said = {
            **{"iss": self.url, "aud": CLIENT_ID, "iat": int(now), "exp": now + self.token_secs},
            **self.person,
            **claims,
        }
        head = {"alg": "ES256" if isinstance(key, ECKey) else "RS256", "kid": key.kid, **(header or {})}
        return jwt.encode(head, {name: value for name, value in said.items() if value is not None}, key)

    def rotate(self) -> None:
        """Signs with a new key from now on, and withdraws the old one."""
        self.key = new_key(secrets.token_hex(4))
        self.published = [self.key]

    async def discovery(self, request: web.Request) -> web.Response:
        offer = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "revocation_endpoint": f"{self.url}/revoke",
        }
        if self.offers_device:
            offer["device_authorization_endpoint"] = f"{self.url}/device"
        return web.json_response(offer)

    async def keys(self, request: web.Request) -> web.Response:
        self.fetches += 1
        keys = {"keys": [key.as_dict(private=False) for key in self.published]}
        return web.json_response(keys if self.document is None else self.document)

    async def authorize(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        assert query["client_id"] == CLIENT_ID
        assert query["response_type"] == "code"
        assert query["code_challenge_method"] == "S256"
        assert "openid" in query["scope"].split()
        code = secrets.token_urlsafe(8)
        self.codes[code] = query
        answer = {"code": code} if self.refusal is None else {"error": self.refusal}
        location = f"{query['redirect_uri']}?{urlencode({**answer, 'state': query['state']})}"
        return web.Response(status=302, headers={"Location": location})

    async def tokens(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        grant = form.get("grant_type")
        if grant == "authorization_code":
            return self._for_code({name: str(value) for name, value in form.items()}, request)
        if grant == "refresh_token" and form["refresh_token"] in self.refresh_tokens:
            self.refresh_tokens.discard(str(form["refresh_token"]))
            return self._answer()
        if grant == "urn:ietf:params:oauth:grant-type:device_code" and form["device_code"] in self.device_codes:
            self.asked.set()
            if not self.approved:
                return web.json_response({"error": "authorization_pending"}, status=400)
            self.device_codes.discard(str(form["device_code"]))
            return self._answer()
        return web.json_response({"error": "invalid_grant"}, status=400)

    def _for_code(self, form: dict[str, str], request: web.Request) -> web.Response:
        asked = self.codes.pop(form["code"], None)
        if asked is None:
            return web.json_response({"error": "invalid_grant", "error_description": "unknown code"}, status=400)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest())
        assert challenge.rstrip(b"=").decode() == asked["code_challenge"]
        assert form["redirect_uri"] == asked["redirect_uri"]
        if self.secret is not None:
            given = base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")).decode()
            assert given == f"{CLIENT_ID}:the%20secret%2Fof%20cortex"
        return self._answer(nonce=asked.get("nonce"))

    def _answer(self, **claims: Any) -> web.Response:
        refresh = secrets.token_urlsafe(8)
        self.refresh_tokens.add(refresh)
        answer = {"token_type": "Bearer", "access_token": "opaque", "refresh_token": refresh, "expires_in": 300}
        return web.json_response({**answer, "id_token": self.token(**claims)})

    async def device(self, request: web.Request) -> web.Response:
        code = secrets.token_urlsafe(8)
        self.device_codes.add(code)
        answer = {"device_code": code, "user_code": "ABCD-EFGH", "verification_uri": f"{self.url}/activate"}
        return web.json_response({**answer, "expires_in": 60, "interval": 0.05})

    async def revoke(self, request: web.Request) -> web.Response:
        self.refresh_tokens.discard(str((await request.post())["token"]))
        return web.Response()

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[SmallIssuer]:
        """Serves inside the body. May run again on the same port."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/.well-known/openid-configuration", self.discovery),
                web.get("/keys", self.keys),
                web.get("/authorize", self.authorize),
                web.post("/token", self.tokens),
                web.post("/device", self.device),
                web.post("/revoke", self.revoke),
            ]
        )
        sock = bind("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with serving([Site(app, sock)], drain_timeout_secs=0):
            yield self

    def settings(self, **more: Any) -> dict[str, Any]:
        """`[auth.oidc]` of a cortex that trusts this issuer."""
        secret = {} if self.secret is None else {"client_secret": self.secret}
        return {"issuer": self.url, "client_id": CLIENT_ID, "roles": ROLES, **secret, **more}
