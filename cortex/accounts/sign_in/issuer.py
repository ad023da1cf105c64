"""The issuer of OpenID Connect, over HTTP: what it offers, its keys, and its answer to a code."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import aiohttp
import msgspec

from cortex.config.sign_in import OidcSettings
from shared.errors import InvalidRequest, Unavailable, shortened
from shared.protocol import ErrorCode
from shared.settings import SettingsError
from shared.tasks import TaskSet

if TYPE_CHECKING:  # it imports cryptography, which takes a while, and is needed only at the first sign-in
    from cortex.accounts.sign_in.tokens import PublicKey

log = logging.getLogger(__name__)

TIMEOUT_SECS: Final = 10.0
KEPT_SECS: Final = 300.0
"""After this time what the issuer offers and its keys are fetched again. Until that succeeds the last ones count."""
PAUSE_SECS: Final = 5.0
"""Between two fetches, whatever tokens ask for unknown keys."""
RETRY_SECS: Final = 5.0
_MAX_BYTES: Final = 1 << 20
_DISCOVERY: Final = "/.well-known/openid-configuration"


class Offer(msgspec.Struct, frozen=True):
    """What an issuer offers (OpenID Connect Discovery 1.0, section 3), as far as it is used here."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    device_authorization_endpoint: str | None = None
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)


class Issuer:
    """One issuer. Use it from one event loop. `keys` are those known now."""

    def __init__(self, settings: OidcSettings) -> None:
        assert settings.issuer is not None
        self._settings = settings
        self.url = settings.issuer
        self.keys: list[PublicKey] = []
        self._offer: Offer | None = None
        self._tried = -PAUSE_SECS  # monotonic seconds
        self._fetched = 0.0
        self._failure: Unavailable | None = None  # of the last fetch
        self._fetching: asyncio.Task[None] | None = None
        self._background = TaskSet()
        self._session: aiohttp.ClientSession | None = None

    async def offer(self) -> Offer:
        """What the issuer offers. Raises Unavailable."""
        await self._current()
        assert self._offer is not None
        return self._offer

    async def known_keys(self) -> list[PublicKey]:
        """The issuer's keys. Raises Unavailable."""
        await self._current()
        return self.keys

    async def newer_keys(self) -> None:
        """Fetches the keys again, unless that was done just now. Raises Unavailable if it fails or failed just now: the
        keys may then be out of date."""
        if self._fetching is not None or not self._fetched_just_now():
            await self._fetch()

    async def id_token(self, code: str, verifier: str, redirect_url: str) -> str:
        """The ID token for a code that the issuer has given a browser.

        Raises:
            InvalidRequest: the issuer refuses the code.
            Unavailable: the issuer does not answer.
        """
        offer = await self.offer()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": redirect_url,
            "client_id": self._settings.client_id or "",
        }
        headers = {}
        secret = await asyncio.to_thread(self._secret)
        if secret is not None:
            methods = offer.token_endpoint_auth_methods_supported
            if "client_secret_post" in methods and "client_secret_basic" not in methods:
                form["client_secret"] = secret
            else:  # RFC 6749, section 2.3.1
                given = f"{quote(form['client_id'], safe='')}:{quote(secret, safe='')}"
                headers["Authorization"] = f"Basic {base64.b64encode(given.encode('ascii')).decode('ascii')}"
        status, answer = await self._ask("POST", offer.token_endpoint, form, headers)
        token = answer.get("id_token") if isinstance(answer, dict) else None
        if status >= 500 or (status == 200 and not isinstance(token, str)):
            raise self._unavailable(f"its token endpoint answers {status} without an ID token")
        if not isinstance(token, str):
            described = answer if isinstance(answer, dict) else {}
            reason = described.get("error_description") or described.get("error")
            raise InvalidRequest(
                f"the issuer refuses the sign-in: {shortened(str(reason or status))}; begin again at /login"
            )
        return token

    async def close(self) -> None:
        await self._background.close()
        if self._session is not None:
            await self._session.close()

    def _secret(self) -> str | None:
        try:
            return self._settings.secret()
        except SettingsError as error:
            log.error("%s", error)  # noqa: TRY400 - the message says all
            message = "sign-in is unavailable: cortex cannot read the client's secret; its log says why"
            raise Unavailable(message, code=ErrorCode.UNAVAILABLE, retry_after=RETRY_SECS) from error

    async def _current(self) -> None:
        """Has an offer and keys afterwards. Those that are old are renewed meanwhile."""
        if self._offer is None:
            await self.newer_keys()
            return
        now = time.monotonic()
        if now - self._fetched > KEPT_SECS and now - self._tried > RETRY_SECS and self._fetching is None:
            _task = self._background.spawn(self._renew(), name="renew the keys of the issuer")

    def _fetched_just_now(self) -> bool:
        """Raises Unavailable if it failed."""
        if time.monotonic() - self._tried >= PAUSE_SECS:
            return False
        self._check()
        return True

    def _check(self) -> None:
        """Raises Unavailable if the last fetch failed. Many may have waited for it, and each gets an error of its
        own."""
        failure = self._failure
        if failure is not None:
            raise Unavailable(failure.message, code=failure.code, retry_after=RETRY_SECS)

    async def _renew(self) -> None:
        try:
            await self.newer_keys()
        except Unavailable as error:
            log.warning("the last keys of the issuer stay in force: %s", error)

    async def _fetch(self) -> None:
        """Waits for the fetch that runs, or begins one. It goes on if its client leaves: others may wait for it, and
        the next one must not have to begin again. Raises Unavailable."""
        if self._fetching is None:
            self._fetching = self._background.spawn(self._fetch_once(), name="keys of the issuer")
        await asyncio.shield(self._fetching)
        self._check()

    async def _fetch_once(self) -> None:
        try:
            await self._fetch_now()
        except Unavailable as error:
            self._tried, self._failure = time.monotonic(), error
        else:
            self._tried = self._fetched = time.monotonic()
            self._failure = None
        finally:
            self._fetching = None

    async def _fetch_now(self) -> None:
        """Raises Unavailable."""
        from cortex.accounts.sign_in.tokens import public_keys  # noqa: PLC0415 - see the import above

        status, found = await self._ask("GET", self.url.rstrip("/") + _DISCOVERY)
        try:
            offer = msgspec.convert(found, Offer)
        except msgspec.ValidationError as error:
            raise self._unavailable(f"{_DISCOVERY} answers {status}: {error}") from error
        if offer.issuer.rstrip("/") != self.url.rstrip("/"):
            raise self._unavailable(f"it calls itself {shortened(offer.issuer)!r}: set [auth.oidc] issuer to that")
        status, found = await self._ask("GET", offer.jwks_uri)
        try:
            self.keys = public_keys(found)
        except ValueError as error:
            raise self._unavailable(f"{shortened(offer.jwks_uri)} answers {status}: {error}") from error
        self._offer = offer

    async def _ask(
        self, method: str, url: str, form: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status and the JSON of the answer, None if it is not JSON. Raises Unavailable."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECS))
        try:
            asked = self._session.request(method, url, data=form, headers=headers, allow_redirects=False)
            async with asked as response:
                body = b""
                async for chunk in response.content.iter_chunked(65536):
                    body += chunk
                    if len(body) > _MAX_BYTES:
                        raise self._unavailable(f"{shortened(url)} answers with more than {_MAX_BYTES} bytes")
        except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError) as error:
            reason = str(error) or f"no answer from {shortened(url)} after {TIMEOUT_SECS:g} s"
            raise self._unavailable(reason) from error
        try:
            return response.status, json.loads(body)
        except (ValueError, RecursionError):
            return response.status, None

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(
            f"sign-in is unavailable: the issuer {shortened(self.url)} cannot be used: {reason}",
            code=ErrorCode.ISSUER_UNAVAILABLE,
            retry_after=RETRY_SECS,
        )
