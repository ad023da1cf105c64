"""Reads and writes what is left of limits."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.tables import LIMIT_STATES

if TYPE_CHECKING:
    from cortex.accounts.database.database import Database

State = dict[str, Any]

EXPIRED_SECS: Final = 35 * 86_400.0
"""A state that was written before that says nothing any more, unless it has a rolling window that is longer: a month is
over by then, and each bucket is full."""

_SCOPE, _STATE, _UPDATED_AT = LIMIT_STATES.c.scope, LIMIT_STATES.c.state, LIMIT_STATES.c.updated_at


class LimitStates:
    """The table of limits' states. Every method raises DatabaseError if the database cannot be used now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> dict[str, State]:
        """By scope."""
        async with self._database.reading() as connection:
            rows = await connection.execute(select(_SCOPE, _STATE))
            return {str(scope): state for scope, state in rows}

    async def write(self, states: Mapping[str, State], now: float) -> None:
        """Replaces the states of these scopes. `now`: Unix time."""
        async with self._database.writing() as connection:
            await _upsert(connection, sqlite.insert, states, now)

    @contextlib.asynccontextmanager
    async def locked(self, scopes: Collection[str]) -> AsyncIterator[LockedStates]:
        """The states of these scopes, which no other cortex can use inside the body. PostgreSQL only."""
        async with self._database.writing() as connection:
            yield await LockedStates.of(connection, sorted(scopes))


class LockedStates:
    """Some rows in a transaction. `now` is the database's Unix time. A row that was deleted before it was locked has no
    state."""

    def __init__(self, connection: AsyncConnection, states: dict[str, State], now: float) -> None:
        self.states = states
        self.now = now
        self._connection = connection

    @classmethod
    async def of(cls, connection: AsyncConnection, scopes: list[str]) -> LockedStates:
        if scopes:  # in order, or two cortexes could wait for each other
            rows = [{"scope": scope, "state": {}, "updated_at": 0.0} for scope in scopes]
            await connection.execute(postgresql.insert(LIMIT_STATES).on_conflict_do_nothing(), rows)
        wanted = select(_SCOPE, _STATE).where(_SCOPE.in_(scopes)).order_by(_SCOPE).with_for_update()
        states = {str(scope): state for scope, state in await connection.execute(wanted)}
        now = await connection.scalar(select(func.extract("epoch", func.clock_timestamp())))
        return cls(connection, states, float(now or 0))

    async def write(self, states: Mapping[str, State]) -> None:
        """Replaces the states of these scopes."""
        await _upsert(self._connection, postgresql.insert, states, self.now)

    async def last_written(self, prefix: str) -> dict[str, float]:
        """The scopes whose names begin so, and when they were last written, in Unix time."""
        rows = await self._connection.execute(select(_SCOPE, _UPDATED_AT).where(_SCOPE.startswith(prefix)))
        return {str(scope): float(at) for scope, at in rows}

    async def delete(self, scopes: Collection[str]) -> None:
        await self._connection.execute(delete(LIMIT_STATES).where(_SCOPE.in_(scopes)))


async def delete_expired(connection: AsyncConnection, now: float) -> None:
    """Deletes the states that are the same as none. `now`: Unix time."""
    row = LIMIT_STATES.c
    asked = select(row.scope, row.state, row.updated_at).where(row.updated_at < now - EXPIRED_SECS)
    for scope, state, at in (await connection.execute(asked)).all():
        if at + _longest_window(state) < now:  # and unchanged: another cortex may use it at this moment
            await connection.execute(delete(LIMIT_STATES).where(row.scope == scope, row.updated_at == at))


def _longest_window(state: State) -> float:
    """Seconds of the longest rolling window. Budgets are named by unit and window: `EUR/month`, `EUR/86400.0`."""
    lengths = (name.rpartition("/")[2] for name in state.get("budgets", {}))
    return max((float(length) for length in lengths if not length.isalpha()), default=0.0)


async def _upsert(connection: AsyncConnection, insert: Any, states: Mapping[str, State], now: float) -> None:
    if states:
        rows = [{"scope": scope, "state": states[scope], "updated_at": now} for scope in sorted(states)]
        statement = insert(LIMIT_STATES)
        changed = {"state": statement.excluded.state, "updated_at": statement.excluded.updated_at}
        await connection.execute(statement.on_conflict_do_update(index_elements=["scope"], set_=changed), rows)
