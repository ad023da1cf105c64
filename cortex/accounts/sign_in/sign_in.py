"""Signs people in: checks tokens and sessions, and takes browsers to the issuer and back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

from cortex.accounts.database.source import DatabaseError
from cortex.accounts.sign_in.issuer import Issuer
from cortex.accounts.sign_in.person import SESSION_PREFIX, Identified, Person, caller_of, person_of
from cortex.config.sign_in import OidcSettings
from shared.errors import InvalidRequest, Unauthorized, Unavailable
from shared.protocol import ErrorCode

if TYPE_CHECKING:
    from cortex.accounts.sign_in.sessions import Sessions

TOKEN_KEPT_SECS: Final = 60.0
"""How long a worker remembers a token before it asks again. Until then a key that the issuer withdraws still counts."""
SESSION_KEPT_SECS: Final = 1.0
"""Likewise a session: a logout takes effect everywhere after this time."""
_RETRY_SECS: Final = 5.0
_RANDOM_BYTES: Final = 32
_MOST_LEFT: Final = 10_000
_LONGEST_SECRET: Final = 128

Result = TypeVar("Result")


class Departure(NamedTuple):
    """What a browser takes along to the issuer. `url` is where it goes; the others it keeps until it is back. `state`
    comes back in the address, `nonce` in the token, and the code is useless without `verifier` (PKCE, RFC 7636)."""

    url: str
    state: str
    nonce: str
    verifier: str


class SignIn:
    """Implements `person.People`. Without `sessions` only tokens are valid, because there is no database."""

    def __init__(self, settings: Callable[[], OidcSettings], issuer: Issuer, sessions: Sessions | None) -> None:
        """`settings`: those in force."""
        self._settings = settings
        self._issuer = issuer
        self._sessions = sessions
        self._left: dict[bytes, None] = {}  # secrets of sessions that have ended, but are still in the database

    @property
    def settings(self) -> OidcSettings:
        return self._settings()

    async def identify(self, credential: bytes) -> Identified:
        """See `person.People`."""
        if credential.startswith(SESSION_PREFIX):
            return await self._session(credential)
        now = time.time()
        claims = await self._claims(credential, now)
        person = person_of(claims, self.settings.groups_claim)
        return Identified(caller_of(person, self.settings), min(float(claims["exp"]), now + TOKEN_KEPT_SECS))

    async def depart(self, redirect_url: str) -> Departure:
        """Starts the sign-in of a browser, which comes back to `redirect_url`. Raises Unavailable."""
        self._writable()
        offer = await self._issuer.offer()
        state, nonce, verifier = (secrets.token_urlsafe(_RANDOM_BYTES) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self.settings.client_id or "",
            "redirect_uri": redirect_url,
            "scope": " ".join(self.settings.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        joined = "&" if "?" in offer.authorization_endpoint else "?"
        return Departure(f"{offer.authorization_endpoint}{joined}{urlencode(query)}", state, nonce, verifier)

    async def arrive(self, code: str, *, nonce: str, verifier: str, redirect_url: str) -> str:
        """Signs in a browser that comes back with a code. Returns the secret of its session.

        Raises:
            ServiceError: the issuer refuses the code, the person has no role, or the issuer or the database is down.
        """
        sessions = self._writable()
        token = await self._issuer.id_token(code, verifier, redirect_url)
        now = time.time()
        claims = await self._claims(token.encode(), now)
        if claims.get("nonce") != nonce:
            raise InvalidRequest("the issuer's token is of another sign-in; begin again at /login")
        person = person_of(claims, self.settings.groups_claim)
        caller_of(person, self.settings)
        return await _done(sessions.begin(person, now, now + self.settings.session_hours * 3600))

    async def leave(self, secret: bytes) -> None:
        """Ends a session. Raises Unavailable if the database still has it: then it is refused here, and `run` tries
        again."""
        try:
            await self._writable().end(secret)
        except DatabaseError as error:
            await self._remember(secret)
            raise Unavailable(
                f"this cortex refuses the session from now on, but could not delete it: {error}; it tries again every "
                f"{_RETRY_SECS:g} s. Until then the session is valid at other cortexes of this database, and here "
                "after a restart",
                code=ErrorCode.DATABASE_UNAVAILABLE,
                retry_after=_RETRY_SECS,
            ) from error

    async def _remember(self, secret: bytes) -> None:
        """A session that has ended, unless the database knows that it is none: anyone may make up secrets."""
        assert self._sessions is not None
        with contextlib.suppress(DatabaseError):
            if await self._sessions.find(secret, time.time()) is None:
                return
        if len(secret) <= _LONGEST_SECRET:
            self._left[secret] = None
        if len(self._left) > _MOST_LEFT:
            del self._left[next(iter(self._left))]

    async def run(self) -> None:
        """Deletes the sessions that have ended while the database could not be written. Never returns."""
        while True:
            await asyncio.sleep(_RETRY_SECS)
            try:
                for secret in list(self._left):
                    await self._writable().end(secret)
                    self._left.pop(secret, None)
            except DatabaseError:
                continue

    async def close(self) -> None:
        await self._issuer.close()

    async def _session(self, secret: bytes) -> Identified:
        now = time.time()
        found: tuple[Person, float] | None = None
        if self._sessions is not None and secret not in self._left:
            found = await _done(self._sessions.find(secret, now))
        if found is None:
            raise Unauthorized("the session has ended: sign in again at /login")
        person, expires_at = found
        return Identified(caller_of(person, self.settings), min(expires_at, now + SESSION_KEPT_SECS))

    async def _claims(self, token: bytes, now: float) -> dict[str, Any]:
        from cortex.accounts.sign_in.tokens import UnknownSigningKey, claims_of  # noqa: PLC0415 - takes a while

        offer = await self._issuer.offer()
        keys = await self._issuer.known_keys()
        audiences = self.settings.token_audiences
        try:
            return claims_of(token, keys, issuer=offer.issuer, audiences=audiences, now=now)
        except UnknownSigningKey:
            await self._issuer.newer_keys()
        try:
            return claims_of(token, self._issuer.keys, issuer=offer.issuer, audiences=audiences, now=now)
        except UnknownSigningKey as error:
            raise Unauthorized("invalid token: none of the issuer's keys has signed it") from error

    def _writable(self) -> Sessions:
        if self._sessions is None:
            raise Unavailable(
                "browsers cannot sign in, because this cortex has no database that it can write: set "
                "state_dir in cortex.toml to a directory that it can write",
                code=ErrorCode.DATABASE_UNAVAILABLE,
                retry_after=_RETRY_SECS,
                permanent=True,
            )
        return self._sessions


async def _done(work: Awaitable[Result]) -> Result:
    try:
        return await work
    except DatabaseError as error:
        raise Unavailable(str(error), code=ErrorCode.DATABASE_UNAVAILABLE, retry_after=_RETRY_SECS) from error
