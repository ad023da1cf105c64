"""Finds out who sent a request, by its API key, token or session. `Gateway` asks before a request is handled."""

from __future__ import annotations

import time
from typing import Final

from cortex.accounts.caller import ANONYMOUS, GUEST, LOOPBACK, Caller
from cortex.accounts.keys.key_table import KeyTable
from cortex.accounts.sign_in.person import SESSION_COOKIE, SESSION_PREFIX, Identified, People, is_token
from cortex.config.settings import CortexConfig
from cortex.http.request import Request
from shared.errors import ServiceError, Unauthorized

_MISSING: Final = "this cortex requires an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
_INVALID: Final = "invalid API key: it is unknown, expired or revoked"

_MAX_REMEMBERED: Final = 4096


class Unidentified(Exception):
    """Only the control knows who sent the request, by this token or this session's secret."""

    def __init__(self, credential: bytes) -> None:
        super().__init__("unidentified")
        self.credential = credential


class Authentication:
    """Knows the keys, and who may come without one.

    A key that has been found is remembered as it was sent, for as long as the keys stay the same: hashing it is a
    twentieth of a request. Only an equal key is found that way, so how long it takes tells no more than the answer.
    """

    def __init__(self, keys: KeyTable, config: CortexConfig, people: People | None = None) -> None:
        """`people`: knows those that sign in; None without `[auth.oidc]`."""
        self._people = people
        self._allow_anonymous = config.gateway.allow_anonymous
        self.use_keys(keys)
        self.configure(config)

    @property
    def signs_in(self) -> bool:
        """Whether people can sign in."""
        return self._people is not None

    def configure(self, config: CortexConfig) -> None:
        """Applies a reloaded configuration."""
        self._trust_loopback = config.auth.trust_loopback
        self._identified: dict[bytes, Identified] = {}  # roles may have changed

    def use_keys(self, keys: KeyTable) -> None:
        """These are the keys from now on."""
        self._keys = keys
        self.has_keys = not keys.empty or self._people is not None  # or what people sign in with
        self._found: dict[bytes, Caller] = {}  # by keys that do not expire

    def caller_of(self, request: Request) -> Caller:
        """Who sent the request.

        Raises:
            Unidentified: `identify` knows.
            ServiceError: a key is needed and is missing or invalid.
        """
        if self.has_keys:
            api_key = request.api_key
            if api_key is not None:
                caller = self._found.get(api_key)
                return self._find(api_key) if caller is None else caller
            if self._people is not None:
                session = _session_of(request.cookie)
                if session is not None:
                    return self._remembered(session)
        return self._without_key(request)

    def is_current(self, api_key: bytes | None, caller: Caller) -> bool:
        """Whether the key by which this caller was found still is that caller's. Always for people and without a
        key."""
        if not caller.key_id or caller.is_person:
            return True
        found = None if api_key is None else self._keys.find(api_key)
        return found is not None and found[0].key_id == caller.key_id

    async def identify(self, request: Request, credential: bytes) -> Caller:
        """Who sent this request, which has raised Unidentified with this credential.

        Raises:
            ServiceError: the credential is not valid, or that cannot be found out now.
        """
        assert self._people is not None
        identified = self._identified  # `configure` may put another in its place meanwhile, where this role is wrong
        try:
            found = await self._people.identify(credential)
        except ServiceError as error:
            if error.status == 401 and credential.startswith(SESSION_PREFIX):
                return self._without_key(request)
            raise
        if len(identified) >= _MAX_REMEMBERED:
            identified.clear()
        identified[credential] = found
        return found.caller

    def _find(self, api_key: bytes) -> Caller:
        found = self._keys.find(api_key)
        if found is None:
            if self._people is not None and is_token(api_key):
                return self._remembered(api_key)
            raise Unauthorized(_INVALID)
        caller, permanent = found
        if permanent:
            self._found[api_key] = caller
        return caller

    def _remembered(self, credential: bytes) -> Caller:
        found = self._identified.get(credential)
        if found is None or found.until <= time.time():
            raise Unidentified(credential)
        return found.caller

    def _without_key(self, request: Request) -> Caller:
        if not self.has_keys:
            if is_loopback(request.peer):
                # A proxy on this host passes on requests of others: they may use models, no more.
                return GUEST if request.forwarded else ANONYMOUS
        elif self._trust_loopback and is_loopback(request.peer) and not request.forwarded:
            return LOOPBACK
        if self._allow_anonymous:
            return GUEST
        raise Unauthorized(_MISSING)


def _session_of(cookies: bytes | None) -> bytes | None:
    """The secret of a session among a request's cookies."""
    if cookies is None:
        return None
    for cookie in cookies.replace(b",", b";").split(b";"):  # several headers are joined with commas
        name, _, value = cookie.strip().partition(b"=")
        if name == SESSION_COOKIE and value.startswith(SESSION_PREFIX):
            return value
    return None


def is_loopback(peer: str) -> bool:
    """True for an address of this host's loopback, also written as IPv6. False for "", an unknown one: of a client that
    has reset its connection the kernel no longer tells the address, but still delivers the request."""
    return peer.startswith(("127.", "::ffff:127.")) or peer == "::1"
