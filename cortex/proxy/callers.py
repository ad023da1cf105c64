"""Who is asking. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cortex.proxy.headers import RequestHeaders

ANONYMOUS = "anonymous"


def key_hash(key: bytes) -> bytes:
    """What is kept of a key: its SHA-256. Keys are long and random, so no slow hash is needed."""
    return hashlib.sha256(key).digest()


def shown_key(headers: RequestHeaders) -> bytes | None:
    """The key of `Authorization: Bearer`, or of Anthropic's `x-api-key`; None when neither is there."""
    given = headers.authorization
    if given is not None and given[:7].lower() == b"bearer ":
        return given[7:].strip() or None
    return headers.api_key


class Callers:
    """Callers by the hashes of their keys."""

    def __init__(self, by_hash: Mapping[bytes, str]) -> None:
        self._by_hash = by_hash

    def identify(self, headers: RequestHeaders) -> str:
        """The caller's name; ANONYMOUS without a key, or with one that is nobody's."""
        key = shown_key(headers)
        return ANONYMOUS if key is None else self._by_hash.get(key_hash(key), ANONYMOUS)
