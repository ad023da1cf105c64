"""The sessions of browsers, in the database: all workers and all cortexes that share it know them."""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import delete, select

from cortex.accounts.database.database import Database
from cortex.accounts.database.tables import SESSIONS
from cortex.accounts.sign_in.person import SESSION_PREFIX, Person

_SECRET_BYTES = 32


class Sessions:
    """Its methods raise DatabaseError if the database fails. Times are UTC seconds.

    A secret is random, so its SHA-256 says nothing about it, and a slow hash would only cost time.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, person: Person, now: float, expires_at: float) -> str:
        """A new session's secret, which is not kept. Forgets the sessions that have ended."""
        secret = SESSION_PREFIX.decode() + secrets.token_urlsafe(_SECRET_BYTES)
        row = {
            "digest": _digest(secret.encode()),
            "subject": person.subject,
            "name": person.name,
            "groups": list(person.groups),
            "created_at": now,
            "expires_at": expires_at,
        }
        async with self._database.writing() as connection:
            await connection.execute(delete(SESSIONS).where(SESSIONS.c.expires_at <= now))
            await connection.execute(SESSIONS.insert().values(row))
        return secret

    async def find(self, secret: bytes, now: float) -> tuple[Person, float] | None:
        """The person of the session with this secret, and when it ends; None if it has ended."""
        asked = select(SESSIONS).where(SESSIONS.c.digest == _digest(secret), SESSIONS.c.expires_at > now)
        async with self._database.reading() as connection:
            row = (await connection.execute(asked)).one_or_none()
        return None if row is None else (Person(row.subject, row.name, tuple(row.groups)), float(row.expires_at))

    async def end(self, secret: bytes) -> None:
        async with self._database.writing() as connection:
            await connection.execute(delete(SESSIONS).where(SESSIONS.c.digest == _digest(secret)))


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
