"""Recognises the key of a request. All that a worker knows of keys."""

from __future__ import annotations

import time
from collections.abc import Iterable
from hashlib import sha256

import msgspec

from cortex.accounts.caller import Caller
from cortex.accounts.keys.api_key import ApiKey


class KeyTable(msgspec.Struct, frozen=True):
    """Callers by the SHA-256 of their key, and the UTC seconds at which keys expire. `configured`: also if none is in
    force, because all are revoked or gone from the file.

    Looking up a digest tells an attacker nothing by the time that it takes: a guess changes all of its digest.
    """

    callers: dict[bytes, Caller] = {}
    expiries: dict[bytes, float] = {}
    configured: bool = False

    @property
    def empty(self) -> bool:
        """No key is configured. One that has expired or was revoked counts as configured: its end must not open cortex
        to everyone."""
        return not (self.callers or self.configured)

    def find(self, api_key: bytes) -> tuple[Caller, bool] | None:
        """The caller with this key, and whether the key never expires; None if it is unknown or has expired."""
        digest = sha256(api_key).digest()
        caller = self.callers.get(digest)
        if caller is None:
            return None
        expiry = self.expiries.get(digest)
        if expiry is None:
            return caller, True
        return None if expiry <= time.time() else (caller, False)


NO_KEYS = KeyTable()


def key_table(keys: Iterable[ApiKey], *, configured: bool = False) -> KeyTable:
    """The table of these keys. Of two with the same secret the later one counts."""
    every = list(keys)
    return KeyTable(
        {key.digest: key.caller for key in every},
        {key.digest: key.expires_at for key in every if key.expires_at is not None},
        configured,
    )
