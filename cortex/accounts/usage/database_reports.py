"""Sums over the records of usage, from the database."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Float, Select, case, cast, func, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.database import Database
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.database.tables import USAGE
from cortex.accounts.usage.energy_report import energy_report
from cortex.accounts.usage.periods import period
from cortex.accounts.usage.query import TIMES, EnergyQuery, UsageQuery
from shared.errors import InvalidRequest, Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import CONTROL_PROCESS_SECS

MAX_ROWS: Final = 20_000
_PERCENT: Final = 95
TOKENS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")


class DatabaseReports:
    """Implements UsageReports."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """For each query, all at one moment, the usage of each group, ordered by the groups: their values, and
        `requests`, `errors` (a status of 400 or more), tokens, `cost` in this currency (requests that were charged in
        another have none), `energy_wh`, `cold_starts`, `first_byte_secs_mean` and `first_byte_secs_p95` (None without
        an answer). With `bucket_secs`, `bucket` is the start of each.

        Raises:
            InvalidRequest: there are more than MAX_ROWS groups.
            Unavailable: the database cannot be read now.
        """
        async with self._reading() as connection:
            return [await self._report(connection, query, currency) for query in queries]

    async def energy(self, queries: Sequence[EnergyQuery]) -> list[list[dict[str, Any]]]:
        """For each query, all at one moment, the energy of each group, ordered by the groups: their values, and
        `energy_wh`. `key` is a name, "" for what no key has used. Raises as `reports` does."""
        postgresql = self._database.is_postgresql
        async with self._reading() as connection:
            return [await _rows(connection, energy_report(query, is_postgresql=postgresql)) for query in queries]

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        """All that is read in the body is of one moment."""
        try:
            async with self._database.reading() as connection:
                if self._database.is_postgresql:
                    await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
                yield connection
        except DatabaseError as error:
            message = f"the usage cannot be read from {error}"
            raise Unavailable(message, code=ErrorCode.DATABASE_UNAVAILABLE, retry_after=CONTROL_PROCESS_SECS) from error

    async def _report(self, connection: AsyncConnection, query: UsageQuery, currency: str) -> list[dict[str, Any]]:
        groups, chosen = _groups(self._database, query), _chosen(query)
        rows = await _rows(connection, _totals(groups, chosen, currency))
        slow = await _rows(connection, _slowest(groups, chosen))
        by_group = {tuple(row[name] for name in groups): row["first_byte_secs_p95"] for row in slow}
        return [{**row, "first_byte_secs_p95": by_group.get(tuple(row[name] for name in groups))} for row in rows]


async def _rows(connection: AsyncConnection, asked: Select[Any]) -> list[dict[str, Any]]:
    found = (await connection.execute(asked.limit(MAX_ROWS + 1))).mappings().all()
    if len(found) > MAX_ROWS:
        raise InvalidRequest(
            f"the report would have more than {MAX_ROWS} rows: shorten from and to, or use fewer groups",
            param="group_by",
        )
    return [dict(row) for row in found]


def _groups(database: Database, query: UsageQuery) -> dict[str, ColumnElement[Any]]:
    found: dict[str, ColumnElement[Any]] = {}
    postgresql = database.is_postgresql
    for name in query.group_by:
        column = USAGE.c.ended_at if name in TIMES else USAGE.c[name]
        found[name] = period(name, column, is_postgresql=postgresql) if name in TIMES else column
    if query.bucket_secs:
        width: ColumnElement[int] = literal_column(str(query.bucket_secs))
        number = USAGE.c.ended_at / width
        whole = func.floor(number) if postgresql else number  # SQLite's cast drops the fraction
        found["bucket"] = cast(whole, BigInteger) * width
    return found


def _chosen(query: UsageQuery) -> ColumnElement[bool]:
    found = (USAGE.c.ended_at >= query.since) & (USAGE.c.ended_at < query.until)
    if query.key_id is not None:
        found &= USAGE.c.key_id == query.key_id
    if query.keys:
        found &= USAGE.c.key.in_(query.keys) | USAGE.c.key_id.in_(query.keys)
    if query.models:
        found &= USAGE.c.model.in_(query.models)
    if query.paths:
        found &= USAGE.c.path.in_(query.paths)
    return found


def _totals(groups: dict[str, ColumnElement[Any]], chosen: ColumnElement[bool], currency: str) -> Select[Any]:
    columns = [
        func.count().label("requests"),
        _number(USAGE.c.status >= 400).label("errors"),
        *(cast(func.coalesce(func.sum(USAGE.c[name]), 0), BigInteger).label(name) for name in TOKENS),
        func.coalesce(func.sum(case((USAGE.c.currency == currency, USAGE.c.cost))), 0.0).label("cost"),
        func.coalesce(func.sum(USAGE.c.energy_wh), 0.0).label("energy_wh"),
        _number(USAGE.c.cold).label("cold_starts"),
        cast(func.avg(USAGE.c.first_byte_secs), Float).label("first_byte_secs_mean"),
    ]
    asked = select(*(column.label(name) for name, column in groups.items()), *columns).where(chosen)
    return asked.group_by(*groups.values()).order_by(*groups.values()) if groups else asked


def _number(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """How many rows it holds for."""
    return func.count(case((condition, 1)))


def _slowest(groups: dict[str, ColumnElement[Any]], chosen: ColumnElement[bool]) -> Select[Any]:
    """The 95th percentile of each group, by the nearest rank: neither database has a function that the other has."""
    part = list(groups.values()) or None
    secs = USAGE.c.first_byte_secs
    ranked = (
        select(
            *(column.label(name) for name, column in groups.items()),
            secs.label("secs"),
            func.row_number().over(partition_by=part, order_by=secs).label("rank"),
            func.count().over(partition_by=part).label("of"),
        )
        .where(chosen, secs.is_not(None))
        .subquery()
    )
    names = [ranked.c[name] for name in groups]
    reached = ranked.c.rank * 100 >= ranked.c.of * _PERCENT
    asked = select(*names, func.min(ranked.c.secs).label("first_byte_secs_p95")).where(reached)
    return asked.group_by(*names) if names else asked
