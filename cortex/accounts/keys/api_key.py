"""One API key, how it is made and recognised. Not compiled: mypyc does not know msgspec's structs.

A key is random, so its SHA-256 says nothing about it, and a slow hash as for passwords would only cost time.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

import msgspec

from cortex.accounts.caller import Caller, Role
from cortex.accounts.limits.terms import KeyLimits

SECRET_PREFIX: Final = "sk-cortex-"  # noqa: S105 - the start of every key that cortex makes
SECRET_BYTES: Final = 32
SHOWN_CHARS: Final = 4
FILE_PREFIX: Final = "file:"
ENVIRONMENT_PREFIX: Final = "env:"
PROVISIONED_PREFIXES: Final = (FILE_PREFIX, ENVIRONMENT_PREFIX)
"""What the id of a key that is not in the database has before its name."""
NO_KEY_LIMITS: Final = KeyLimits()


class ApiKey(msgspec.Struct, frozen=True):
    """A key that is not revoked. `id` stays when the key is rotated. `digest` is the SHA-256 of the secret, `prefix`
    its first characters, "" if unknown. Times are UTC seconds since 1970. `source`: `database`,
    `environment`, or the file that has it. The other fields are those of `Caller`."""

    id: str
    name: str
    digest: bytes
    prefix: str = ""
    role: Role = "user"
    models: tuple[str, ...] = ()
    priority: int = 0
    weight: float = 1.0
    limits: KeyLimits = NO_KEY_LIMITS
    created_at: float | None = None
    expires_at: float | None = None
    source: str = "database"

    @property
    def caller(self) -> Caller:
        """This key as requests see it."""
        return Caller(
            self.id,
            self.name,
            role=self.role,
            priority=self.priority,
            weight=self.weight,
            models=self.models,
            limited=not self.limits.unlimited,
        )


def prefix_of(secret: str) -> str:
    """What may be shown of a key that cortex has made; "" for any other, which may be short."""
    return secret[: len(SECRET_PREFIX) + SHOWN_CHARS] if secret.startswith(SECRET_PREFIX) else ""


def new_secret() -> str:
    """A new key: 32 random bytes as base64url, behind a prefix by which scanners for leaked keys know it."""
    return SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest_of(secret: str) -> bytes:
    """The SHA-256 of a key, which is ASCII."""
    return hashlib.sha256(secret.encode("ascii")).digest()
