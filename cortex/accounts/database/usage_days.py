"""The daily sums of usage, which are kept longer than the records and make reports of long times fast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.latency_classes import class_of
from cortex.accounts.database.tables import LATENCY_CLASSES, USAGE, USAGE_DAYS, USAGE_TOKENS

DAY_SECS: Final = 86_400.0
_KEY: Final = tuple(column.name for column in USAGE_DAYS.primary_key)
_SUMS: Final = tuple(column.name for column in USAGE_DAYS.columns if column.name not in _KEY)


def day_of(at: float) -> float:
    """The first second of the day."""
    return at // DAY_SECS * DAY_SECS


async def add_to_days(
    connection: AsyncConnection, records: Iterable[Mapping[str, Any]], *, is_postgresql: bool
) -> None:
    """Adds rows of the table of usage, which are new in this transaction."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        _add(sums.setdefault(_key_of(record), dict.fromkeys(_SUMS, 0)), record)
    await _add_sums(connection, sums, is_postgresql=is_postgresql)


async def add_energy_to_days(
    connection: AsyncConnection, wh: Sequence[tuple[Mapping[str, Any], float]], *, is_postgresql: bool
) -> None:
    """Adds energy of rows of the table of usage."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record, more in wh:
        sums.setdefault(_key_of(record), dict.fromkeys(_SUMS, 0))["energy_wh"] += more
    await _add_sums(connection, sums, is_postgresql=is_postgresql)


async def delete_days(connection: AsyncConnection, before: float) -> None:
    """Deletes the sums of earlier days, except of those that still have records."""
    oldest = (await connection.execute(select(func.min(USAGE.c.ended_at)))).scalar()
    first = before if oldest is None else min(before, day_of(oldest))
    await connection.execute(delete(USAGE_DAYS).where(USAGE_DAYS.c.day < first))


def _key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    day = day_of(record["ended_at"])
    return (day, *(record[name] for name in _KEY[1:-1]), record["currency"] or "")


def _add(sums: dict[str, Any], record: Mapping[str, Any]) -> None:
    sums["requests"] += 1
    sums["cold_starts"] += bool(record["cold"])
    for name in (*USAGE_TOKENS, "cost"):
        sums[name] += record[name] or 0
    secs = record["first_byte_secs"]
    if secs is not None:
        sums["first_byte_secs"] += secs
        sums[LATENCY_CLASSES[class_of(secs)]] += 1


async def _add_sums(
    connection: AsyncConnection, sums: Mapping[tuple[Any, ...], Mapping[str, Any]], *, is_postgresql: bool
) -> None:
    if not sums:
        return
    insert: Any = postgresql.insert if is_postgresql else sqlite.insert
    added = insert(USAGE_DAYS)
    more = {name: USAGE_DAYS.c[name] + added.excluded[name] for name in _SUMS}
    # In order, so that two cortexes that change the same rows wait for each other and not in a circle.
    rows = [{**dict(zip(_KEY, key, strict=True)), **each} for key, each in sorted(sums.items())]
    await connection.execute(added.on_conflict_do_update(index_elements=list(_KEY), set_=more), rows)
