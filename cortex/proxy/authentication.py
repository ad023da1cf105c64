"""Finds out who sent a request, by its API key. `Gateway` asks before a request is handled."""

from __future__ import annotations

from typing import Final

from cortex.accounts.caller import ANONYMOUS, GUEST, LOOPBACK, Caller
from cortex.accounts.keys.key_table import KeyTable
from cortex.config.settings import CortexConfig
from cortex.http.request import Request
from shared.errors import Unauthorized

_MISSING: Final = "this cortex requires an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
_INVALID: Final = "invalid API key: it is unknown, expired or revoked"


class Authentication:
    """Knows the keys, and who may come without one.

    A key that has been found is remembered as it was sent, for as long as the keys stay the same: hashing it is a
    twentieth of a request. Only an equal key is found that way, so how long it takes tells no more than the answer.
    """

    def __init__(self, keys: KeyTable, config: CortexConfig) -> None:
        self.use_keys(keys)
        self._allow_anonymous = config.gateway.allow_anonymous
        self.configure(config)

    def configure(self, config: CortexConfig) -> None:
        """Applies a reloaded configuration."""
        self._trust_loopback = config.auth.trust_loopback

    def use_keys(self, keys: KeyTable) -> None:
        """These are the keys from now on."""
        self._keys = keys
        self.has_keys = not keys.empty
        self._found: dict[bytes, Caller] = {}  # by keys that do not expire

    def caller_of(self, request: Request) -> Caller:
        """Who sent the request.

        Raises:
            ServiceError: a key is needed and is missing or invalid.
        """
        if self.has_keys:
            api_key = request.api_key
            if api_key is not None:
                caller = self._found.get(api_key)
                return self._find(api_key) if caller is None else caller
        return self._without_key(request)

    def _find(self, api_key: bytes) -> Caller:
        caller = self._keys.find(api_key)
        if caller is None:
            raise Unauthorized(_INVALID)
        if self._keys.is_permanent(api_key):
            self._found[api_key] = caller
        return caller

    def _without_key(self, request: Request) -> Caller:
        if not self.has_keys:
            if is_loopback(request.peer):
                return ANONYMOUS
        elif self._trust_loopback and is_loopback(request.peer) and not request.forwarded:
            return LOOPBACK
        if self._allow_anonymous:
            return GUEST
        raise Unauthorized(_MISSING)


def is_loopback(peer: str) -> bool:
    """True for an address of this host's loopback, also written as IPv6. False for "", an unknown one: of a client that
    has reset its connection the kernel no longer tells the address, but still delivers the request."""
    return peer.startswith(("127.", "::ffff:127.")) or peer == "::1"
