"""The keys in the database."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from sqlalchemy import Row, select, update

from cortex.accounts.database.database import Database
from cortex.accounts.database.source import ConstraintViolated
from cortex.accounts.database.tables import API_KEYS
from cortex.accounts.keys.api_key import ApiKey
from cortex.accounts.limits.terms import KeyLimits

_ID_BYTES = 8
_VERSION = "SELECT coalesce(sum(revision), 0) FROM api_keys"
"""Rows are never deleted and each change adds 1 to its row, so no clock and no shared counter is needed."""


class KeyStore:
    """Reads and changes the keys that are not revoked. Its methods raise DatabaseError if the database fails; `remedy`:
    what to do then."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.remedy = database.remedy

    async def version(self) -> int:
        """A number that grows with each change of a key, whichever process makes it."""
        return await self._database.number(_VERSION)

    async def keys(self) -> list[ApiKey]:
        """All keys, by name."""
        asked = select(API_KEYS).where(API_KEYS.c.revoked_at.is_(None)).order_by(API_KEYS.c.name)
        async with self._database.reading() as connection:
            return [_key(row) for row in await connection.execute(asked)]

    async def add(self, key: ApiKey) -> bool:
        """Stores a new key under an id of its own. False if there is one of that name."""
        values = {
            **msgspec.structs.asdict(key),
            "id": secrets.token_hex(_ID_BYTES),
            "digest": key.digest.hex(),
            "models": list(key.models),
            "limits": msgspec.to_builtins(key.limits),
            "revision": 1,
        }
        del values["source"]
        try:
            async with self._database.writing() as connection:
                await connection.execute(API_KEYS.insert().values(values))
        except ConstraintViolated:
            return False
        return True

    async def revoke(self, name: str, now: float) -> bool:
        """Ends a key; its usage and its name in it stay. False if there is none of that name."""
        return await self._change(name, {"revoked_at": now})

    async def replace_secret(self, name: str, digest: bytes, prefix: str) -> bool:
        """Gives a key another secret. False if there is none of that name."""
        return await self._change(name, {"digest": digest.hex(), "prefix": prefix})

    async def _change(self, name: str, values: dict[str, Any]) -> bool:
        asked = (
            update(API_KEYS)
            .where(API_KEYS.c.name == name, API_KEYS.c.revoked_at.is_(None))
            .values(**values, revision=API_KEYS.c.revision + 1)
        )
        async with self._database.writing() as connection:
            return (await connection.execute(asked)).rowcount > 0


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        row.id,
        row.name,
        bytes.fromhex(row.digest),
        row.prefix,
        role=row.role,
        models=tuple(row.models),
        priority=row.priority,
        weight=row.weight,
        limits=msgspec.convert(row.limits, KeyLimits),
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
