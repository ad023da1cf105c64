"""Moves usage records from the journals into the database, each exactly once, and deletes old ones.

How far a journal has been read is written in the same transaction as its records, so a process that is killed at any
moment leaves both as they were before or as they are after.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.database import Database
from cortex.accounts.database.limit_states import delete_expired
from cortex.accounts.database.source import ConstraintViolated
from cortex.accounts.database.tables import USAGE, USAGE_JOURNALS
from cortex.accounts.database.usage_days import DAY_SECS, add_to_days, day_of, delete_days
from cortex.accounts.prices import PriceList
from cortex.accounts.usage.journal_file import JournalPart, delete_abandoned, journals, read_part
from cortex.accounts.usage.record import UsageRecord

DELETED_AT_ONCE: Final = 1000
"""Old rows in one transaction, so that others that write need not wait."""
LOOKED_UP_AT_ONCE: Final = 500
FORGET_AFTER_SECS: Final = 90 * 86_400.0
"""When the position of a journal is deleted that is not here: that of a cortex whose state directory is gone."""
_MOST: Final = 2**31 - 1  # of the tables' integers

log = logging.getLogger(__name__)


class Recorder:
    """Moves the journals of one directory. One process at a time uses a directory."""

    def __init__(self, database: Database, directory: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970."""
        self._database = database
        self._directory = directory
        self._clock = clock
        self._positions: dict[str, int] = {}
        self._insert: Any = postgresql.insert if database.is_postgresql else sqlite.insert

    async def move(self) -> bool:
        """Moves what the journals have now. True if there was more than was moved.

        Raises:
            DatabaseError: the database cannot be written now.
            OSError: a journal cannot be read.
        """
        more = False
        try:
            for path in journals(self._directory):
                more = await self._move_part(path) or more
        except BaseException:
            self._positions.clear()  # the last transaction may have been carried out or not
            raise
        return more

    async def _move_part(self, path: Path) -> bool:
        """Moves the next part of a journal. True if there is another."""
        position = await self._position(path.name)
        part = read_part(path, position)
        if part.broken:
            log.error("%d lines of %s cannot be read and are left out", part.broken, path)
        if part.end > position:
            await self._store(path.name, part)
        if part.is_last:
            os.unlink(path)  # noqa: PTH108 - it may block: this process does nothing else
            async with self._database.writing() as connection:
                await connection.execute(delete(USAGE_JOURNALS).where(USAGE_JOURNALS.c.name == path.name))
            self._positions.pop(path.name, None)
            return False
        return bool(part.records)

    async def _position(self, name: str) -> int:
        if name not in self._positions:
            async with self._database.reading() as connection:
                asked = select(USAGE_JOURNALS.c.position).where(USAGE_JOURNALS.c.name == name)
                self._positions[name] = (await connection.execute(asked)).scalar_one_or_none() or 0
        return self._positions[name]

    async def _store(self, name: str, part: JournalPart) -> None:
        every = [usage_row(record, part.prices) for record in part.records]
        rows = list({(row["request_id"], row["ended_at"]): row for row in every}.values())
        try:
            await self._insert_rows(name, part.end, rows)
        except ConstraintViolated:  # two requests whose client gave them one id ended at the same microsecond
            await self._insert_rows(name, part.end, await self._without_known(rows))
        self._positions[name] = part.end

    async def _insert_rows(self, name: str, end: int, rows: Sequence[dict[str, Any]]) -> None:
        position = {"name": name, "position": end, "updated_at": self._clock()}
        postgresql = self._database.is_postgresql
        async with self._database.writing() as connection:
            if rows:
                await connection.execute(USAGE.insert(), rows)
                await add_to_days(connection, rows, is_postgresql=postgresql)
            moved = self._insert(USAGE_JOURNALS).values(position)
            await connection.execute(
                moved.on_conflict_do_update(index_elements=[USAGE_JOURNALS.c.name], set_=dict(moved.excluded))
            )

    async def _without_known(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that are not in the database."""
        known: set[tuple[str, float]] = set()
        async with self._database.reading() as connection:
            for start in range(0, len(rows), LOOKED_UP_AT_ONCE):
                ids = [row["request_id"] for row in rows[start : start + LOOKED_UP_AT_ONCE]]
                asked = select(USAGE.c.request_id, USAGE.c.ended_at).where(USAGE.c.request_id.in_(ids))
                known.update((row.request_id, row.ended_at) for row in await connection.execute(asked))
        return [row for row in rows if (row["request_id"], row["ended_at"]) not in known]

    async def delete_old(self, retention_days: int, daily_retention_days: int = 0) -> bool:
        """Deletes some of the records of the days that are older, and daily sums; 0 deletes none. Also what is left of
        limits that have not been used for long. True if there are more.

        Raises:
            DatabaseError: the database cannot be written now.
        """
        delete_abandoned(self._directory)
        now = self._clock()
        async with self._database.writing() as connection:
            forgotten = USAGE_JOURNALS.c.updated_at < now - FORGET_AFTER_SECS
            await connection.execute(delete(USAGE_JOURNALS).where(forgotten))
            more = bool(retention_days) and await _delete_some(connection, day_of(now - retention_days * DAY_SECS))
            if daily_retention_days:
                await delete_days(connection, day_of(now - daily_retention_days * DAY_SECS))
            await delete_expired(connection, now)
            return more


async def _delete_some(connection: AsyncConnection, before: float) -> bool:
    old = USAGE.c.ended_at < before
    asked = select(USAGE.c.ended_at).where(old).order_by(USAGE.c.ended_at).offset(DELETED_AT_ONCE - 1).limit(1)
    last = (await connection.execute(asked)).scalar_one_or_none()
    await connection.execute(delete(USAGE).where(old if last is None else USAGE.c.ended_at <= last))
    return last is not None


def usage_row(record: UsageRecord, prices: PriceList) -> dict[str, Any]:
    """The row of a record, with its cost if its model has a price and its engine has told what it used."""
    row = {name: _storable(value) for name, value in msgspec.structs.asdict(record).items()}
    priced, prompt, completion = prices.prices.get(record.model), record.prompt_tokens, record.completion_tokens
    cost = None
    if priced is not None and (prompt is not None or completion is not None):
        cost = priced.cost(prompt or 0, completion or 0, record.cached_tokens or 0)
    return {**row, "cost": cost, "currency": None if cost is None else prices.currency}


def _storable(value: Any) -> Any:
    """A client or an engine may send what PostgreSQL cannot hold."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    return min(value, _MOST) if isinstance(value, int) and not isinstance(value, bool) else value
