"""Who is asking. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

ANONYMOUS = "anonymous"


@lru_cache(maxsize=4096)
def key_hash(key: bytes) -> bytes:
    """What is kept of a key: its SHA-256. Keys are long and random, so no slow hash is needed.

    The last ones that were shown are remembered: a hash is 3 us, and a client shows the same key again and again.
    """
    return hashlib.sha256(key).digest()


class Callers:
    """Callers by the hashes of their keys."""

    def __init__(self, by_hash: Mapping[bytes, str]) -> None:
        self._by_hash = by_hash

    def identify(self, key: bytes | None) -> str:
        """The caller's name; ANONYMOUS without a key, or with one that is nobody's."""
        return ANONYMOUS if key is None else self._by_hash.get(key_hash(key), ANONYMOUS)
