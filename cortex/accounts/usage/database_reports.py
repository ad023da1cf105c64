"""Sums over the records of usage, from the database."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import Any, Final
from weakref import WeakValueDictionary

from sqlalchemy import Select, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.database import Database
from cortex.accounts.database.latency_classes import percentile
from cortex.accounts.database.source import DatabaseError
from cortex.accounts.database.tables import LATENCY_CLASSES, USAGE, USAGE_DAYS
from cortex.accounts.database.usage_days import DAY_SECS, day_of
from cortex.accounts.usage.energy_report import energy_report
from cortex.accounts.usage.query import EnergyQuery, UsageQuery
from cortex.accounts.usage.usage_sums import (
    PERCENT,
    ReportTimes,
    needs_records,
    of_records_alone,
    requests_of_days,
    slowest,
    times_of,
    totals,
)
from shared.errors import InvalidRequest, Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import CONTROL_PROCESS_SECS
from shared.tasks import timeout

MAX_ROWS: Final = 20_000
REPORT_SECS: Final = 20.0
"""For all queries of a report."""
EXACT_REQUESTS: Final = 100_000
"""Reports of more use the daily sums, whose percentiles are estimates."""
AT_ONCE: Final = 2
"""Reports that read at a time, only one of them for a key that asks for its own usage. Others wait, so that the
database's connections are not all theirs."""
_ROWS_AT_ONCE: Final = 100  # between two turns of other tasks


class DatabaseReports:
    """Implements UsageReports."""

    def __init__(
        self, database: Database, retention_days: Callable[[], int], clock: Callable[[], float] = time.time
    ) -> None:
        """`retention_days`: how long records are kept now, 0: always; earlier days are read from the daily sums, also
        those whose records are being deleted. `clock`: seconds since 1970."""
        self._database = database
        self._retention_days = retention_days
        self._clock = clock
        self._places = asyncio.Semaphore(AT_ONCE)
        self._of_keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def reports(self, queries: Sequence[UsageQuery], currency: str) -> list[list[dict[str, Any]]]:
        """For each query, all at one moment, the usage of each group, ordered by the groups: their values, and
        `requests`, `errors` (a status of 400 or more), tokens, `cost` in this currency (requests that were charged in
        another have none), `energy_wh`, `cold_starts`, `first_byte_secs_mean` and `first_byte_secs_p95` (None without
        an answer). With `bucket_secs`, `bucket` is the start of each.

        Raises:
            InvalidRequest: there are more than MAX_ROWS groups, it takes too long, or the records are deleted.
            Unavailable: the database cannot be read now, or is busy with other reports.
        """
        async with self._reading(queries) as connection:
            kept_since = await self._kept_since(connection)
            return [await self._report(connection, query, currency, kept_since) for query in queries]

    async def energy(self, queries: Sequence[EnergyQuery]) -> list[list[dict[str, Any]]]:
        """For each query, all at one moment, the energy of each group, ordered by the groups: their values, and
        `energy_wh`. `key` is a name, "" for what no key has used. Raises as `reports` does."""
        postgresql = self._database.is_postgresql
        async with self._reading(queries) as connection:
            return [await _rows(connection, energy_report(query, is_postgresql=postgresql)) for query in queries]

    @contextlib.asynccontextmanager
    async def _reading(self, queries: Sequence[UsageQuery | EnergyQuery]) -> AsyncIterator[AsyncConnection]:
        """All that is read in the body is of one moment. What takes too long is stopped."""
        key_id = queries[0].key_id if queries else None  # the same in all
        async with self._place(key_id):
            began = monotonic()
            try:
                async with (
                    self._database.reading() as connection,
                    self._database.stopping_after(REPORT_SECS, connection),
                ):
                    if self._database.is_postgresql:
                        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
                    yield connection
            except DatabaseError as error:
                if monotonic() - began >= REPORT_SECS:
                    raise InvalidRequest(
                        f"the report takes longer than {REPORT_SECS:g} s: ask for a shorter time range (from, to), or "
                        "group by day or month instead of hour",
                        param="from",
                    ) from error
                raise Unavailable(
                    f"the usage cannot be read from {error}",
                    code=ErrorCode.DATABASE_UNAVAILABLE,
                    retry_after=CONTROL_PROCESS_SECS,
                ) from error

    @contextlib.asynccontextmanager
    async def _place(self, key_id: str | None) -> AsyncIterator[None]:
        """One of the places, held inside the body. Two reports of one key cannot take them all."""
        async with contextlib.AsyncExitStack() as held:
            try:
                async with timeout(REPORT_SECS):
                    if key_id is not None:
                        await held.enter_async_context(self._of_keys.setdefault(key_id, asyncio.Lock()))
                    await held.enter_async_context(self._places)
            except asyncio.TimeoutError as error:
                raise Unavailable("the database is busy with other reports", retry_after=REPORT_SECS) from error
            yield

    async def _report(
        self, connection: AsyncConnection, query: UsageQuery, currency: str, kept_since: float
    ) -> list[dict[str, Any]]:
        postgresql = self._database.is_postgresql
        times = await _times(connection, query, kept_since)
        rows = await _rows(connection, totals(query, times, currency, is_postgresql=postgresql))
        if times.days:
            await _estimate_p95(rows)
        else:
            await _add_p95(connection, query, times, rows, is_postgresql=postgresql)
        return rows

    async def _kept_since(self, connection: AsyncConnection) -> float:
        """The first second from which on all records are there; 0 if none are deleted."""
        deleted_until = await _deleted_until(connection)
        retention_days = self._retention_days()
        if not retention_days:
            return deleted_until
        # By a clock that is read after the transaction's first query: it does not see what is deleted from then on.
        return max(deleted_until, day_of(self._clock() - retention_days * DAY_SECS))


async def _times(connection: AsyncConnection, query: UsageQuery, kept_since: float) -> ReportTimes:
    if query.since >= kept_since:
        if needs_records(query):
            return of_records_alone(query)
        if (await connection.execute(requests_of_days(query))).scalar_one() <= EXACT_REQUESTS:
            return of_records_alone(query)
    elif needs_records(query):
        day = time.strftime("%Y-%m-%d", time.gmtime(kept_since))
        raise InvalidRequest(f"requests before {day} are known by day only: group by day, or begin there", param="from")
    return times_of(query, kept_since)


async def _deleted_until(connection: AsyncConnection) -> float:
    """The first second of the day after the last one of which all records are deleted; 0 if there is none."""
    oldest = (await connection.execute(select(func.min(USAGE.c.ended_at)))).scalar()
    asked = select(func.max(USAGE_DAYS.c.day))
    if oldest is not None:
        asked = asked.where(USAGE_DAYS.c.day < day_of(oldest))
    last = (await connection.execute(asked)).scalar()
    return 0.0 if last is None else float(last) + DAY_SECS


async def _rows(connection: AsyncConnection, asked: Select[Any]) -> list[dict[str, Any]]:
    result = await connection.execute(asked.limit(MAX_ROWS + 1))
    found: list[dict[str, Any]] = []
    for part in result.mappings().partitions(_ROWS_AT_ONCE):
        found += [dict(row) for row in part]
        await asyncio.sleep(0)
    if len(found) > MAX_ROWS:
        raise InvalidRequest(
            f"the report would have more than {MAX_ROWS} rows: ask for a shorter time range (from, to), or use fewer "
            "groups",
            param="group_by",
        )
    return found


async def _estimate_p95(rows: Sequence[dict[str, Any]]) -> None:
    """From the classes, which it takes out of the rows."""
    for number, row in enumerate(rows):
        row["first_byte_secs_p95"] = percentile([row.pop(name) for name in LATENCY_CLASSES], PERCENT)
        if number % _ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)


async def _add_p95(
    connection: AsyncConnection,
    query: UsageQuery,
    times: ReportTimes,
    rows: Sequence[dict[str, Any]],
    *,
    is_postgresql: bool,
) -> None:
    groups = (*query.group_by, "bucket") if query.bucket_secs else query.group_by
    found = await _rows(connection, slowest(query, times, is_postgresql=is_postgresql))
    by_group = {tuple(row[name] for name in groups): row["first_byte_secs_p95"] for row in found}
    for row in rows:
        row["first_byte_secs_p95"] = by_group.get(tuple(row[name] for name in groups))
