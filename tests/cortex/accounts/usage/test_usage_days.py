"""Daily sums of usage: they say what the records say, and stay when these are deleted."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text

from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.latency_classes import CLASSES, UPPER_SECS, class_of, percentile
from cortex.accounts.database.source import DatabaseSource
from cortex.accounts.database.tables import USAGE, USAGE_DAYS
from cortex.accounts.prices import PriceList, Prices
from cortex.accounts.usage import database_reports
from cortex.accounts.usage.database_reports import DatabaseReports
from cortex.accounts.usage.journal_file import JournalWriter
from cortex.accounts.usage.query import GROUPS, UsageQuery, parse_query
from cortex.accounts.usage.record import UsageRecord
from cortex.accounts.usage.recorder import Recorder
from cortex.accounts.usage.usage_sums import TimeSpan, times_of
from shared.errors import InvalidRequest, Unavailable
from tests.cortex.accounts.usage.records import usage_record

DAY = 86_400.0
FIRST = 1_795_910_400.0  # 2026-11-29T00:00:00Z
NOW = FIRST + 10 * DAY + 3600
PRICES = {"EUR": PriceList("EUR", {"a": Prices(1.0, 0.0, 2.0)}), "USD": PriceList("USD", {"a": Prices(2.0, 0.0, 3.0)})}


async def recorded(database: Database, directory: Path, *records: UsageRecord, currency: str = "EUR") -> Recorder:
    writer, recorder = JournalWriter(directory), Recorder(database, directory, lambda: NOW)
    writer.write(records, PRICES[currency])
    writer.close()
    await recorder.move()
    return recorder


def random_records(dice: random.Random, count: int) -> list[UsageRecord]:
    """Of ten days, some without tokens, an answer or a price."""
    found = []
    for _ in range(count):
        key = dice.choice("xyz")
        found.append(
            usage_record(
                ended_at=FIRST + dice.random() * 10 * DAY,
                key_id=f"id-{key}",
                key=key,
                model=dice.choice("ab"),
                node=dice.choice(("n", "")),
                path=dice.choice(("/v1/chat/completions", "/v1/messages")),
                status=dice.choice((200, 200, 429)),
                prompt_tokens=dice.choice((None, 1000)),
                first_byte_secs=dice.choice((None, dice.lognormvariate(0, 1))),
                cold=dice.random() < 0.2,
            )
        )
    return found


async def report(
    database: Database, query: UsageQuery, monkeypatch: pytest.MonkeyPatch, *, exact: bool, retention_days: int = 0
) -> list[dict[str, Any]]:
    """From the records, or else from daily sums where there are whole days."""
    monkeypatch.setattr(database_reports, "EXACT_REQUESTS", 1_000_000 if exact else -1)
    reports = DatabaseReports(database, lambda: retention_days, lambda: NOW)
    return (await reports.reports([query], "EUR"))[0]


def without_percentiles(rows: list[dict[str, Any]]) -> list[Any]:
    return [
        {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in row.items()
            if name != "first_byte_secs_p95"
        }
        for row in rows
    ]


async def test_daily_sums_say_what_records_say(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all groups, filters and times; percentiles are near those of the records."""
    dice = random.Random(1)
    await recorded(database, tmp_path, *random_records(dice, 300))
    await recorded(database, tmp_path, *random_records(dice, 100), currency="USD")
    whole = UsageQuery(FIRST, NOW, is_open=True)
    queries = [replace(whole, group_by=(group,)) for group in GROUPS if group != "hour"]
    queries += [
        whole,
        UsageQuery(FIRST, NOW),
        replace(whole, group_by=("key", "model", "day")),
        replace(whole, bucket_secs=int(DAY)),
    ]
    queries += [replace(whole, keys=("x",)), replace(whole, key_id="id-y"), replace(whole, models=("b",))]
    queries += [replace(whole, paths=("/v1/messages",)), UsageQuery(FIRST + 1e4, FIRST + 5.5 * DAY, ("model",))]
    queries += [UsageQuery(FIRST + 100, FIRST + 2000), UsageQuery(FIRST + 0.5 * DAY, FIRST + 1.5 * DAY, ("key",))]
    for query in queries:
        exact = await report(database, query, monkeypatch, exact=True)
        summed = await report(database, query, monkeypatch, exact=False)
        assert without_percentiles(exact) == without_percentiles(summed), query
        for one, other in zip(exact, summed, strict=True):
            p95 = one["first_byte_secs_p95"]
            assert other["first_byte_secs_p95"] == (None if p95 is None else pytest.approx(p95, rel=0.45)), query


async def test_days_stay_when_their_records_are_deleted(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then such a day counts as a whole, and its hours are not known. In the end the sums go as well."""
    records = random_records(random.Random(2), 100)
    recorder = await recorded(database, tmp_path, *records)
    while await recorder.delete_old(4):
        pass
    kept = FIRST + 6 * DAY
    async with database.reading() as connection:
        oldest = (await connection.execute(select(func.min(USAGE.c.ended_at)))).scalar_one()
    assert oldest == min(record.ended_at for record in records if record.ended_at >= kept)
    for exact in (True, False):
        (total,) = await report(database, UsageQuery(FIRST + 1, NOW), monkeypatch, exact=exact)
        assert total["requests"] == 100
        (total,) = await report(database, UsageQuery(FIRST + 1.5 * DAY, FIRST + 2.5 * DAY), monkeypatch, exact=exact)
        assert total["requests"] == sum(FIRST + DAY <= record.ended_at < FIRST + 3 * DAY for record in records)
        for query in (UsageQuery(FIRST, NOW, ("hour",)), UsageQuery(FIRST, NOW, bucket_secs=3600)):
            with pytest.raises(InvalidRequest, match="before 2026-12-05 are known by day only"):
                await report(database, query, monkeypatch, exact=exact)
    assert await report(database, UsageQuery(kept, NOW, ("hour",)), monkeypatch, exact=False)
    await recorder.delete_old(4, 2)
    async with database.reading() as connection:
        first = (await connection.execute(select(func.min(USAGE_DAYS.c.day)))).scalar_one()
    assert first == kept


async def test_reports_while_records_are_deleted(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are deleted in small batches, so for some time a day has some of its records. Its sums count, before and
    after; also when an old record comes late, from the journal of a cortex that was away."""
    records = random_records(random.Random(4), 200)
    recorder = await recorded(database, tmp_path, *records)
    queries = [
        UsageQuery(FIRST, NOW),
        UsageQuery(FIRST, NOW, ("day",)),
        UsageQuery(FIRST + 1.5 * DAY, FIRST + 2.2 * DAY, ("model",)),
        UsageQuery(FIRST + 2.2 * DAY, FIRST + 2.4 * DAY),
        UsageQuery(FIRST + 2.6 * DAY, FIRST + 7.5 * DAY, ("key",)),
        UsageQuery(FIRST, FIRST + 2.6 * DAY, bucket_secs=int(DAY)),
        UsageQuery(FIRST + 6.5 * DAY, FIRST + 7.5 * DAY, ("hour",)),
    ]

    async def counts() -> list[Any]:
        """Of each query."""
        found = [
            await report(database, query, monkeypatch, exact=exact, retention_days=4)
            for query in queries
            for exact in (True, False)
        ]
        for query in (UsageQuery(FIRST, NOW, ("hour",)), UsageQuery(FIRST + 5.9 * DAY, NOW, bucket_secs=3600)):
            with pytest.raises(InvalidRequest, match="before 2026-12-05 are known by day only"):
                await report(database, query, monkeypatch, exact=True, retention_days=4)
        return [without_percentiles(rows) for rows in found]

    before = await counts()
    assert before[0][0]["requests"] == 200
    batch = sum(record.ended_at <= FIRST + 2.5 * DAY for record in records)
    monkeypatch.setattr("cortex.accounts.usage.recorder.DELETED_AT_ONCE", batch)
    assert await recorder.delete_old(4)
    async with database.reading() as connection:
        oldest = (await connection.execute(select(func.min(USAGE.c.ended_at)))).scalar_one()
    assert FIRST + 2.5 * DAY < oldest < FIRST + 3 * DAY
    assert await counts() == before
    while await recorder.delete_old(4):
        pass
    assert await counts() == before
    await recorded(database, tmp_path, usage_record(ended_at=FIRST + 0.1 * DAY))
    for exact in (True, False):
        (total,) = await report(database, UsageQuery(FIRST, NOW), monkeypatch, exact=exact, retention_days=4)
        assert total["requests"] == 201


async def test_a_record_that_comes_twice_counts_once(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients choose the ids of requests, so two may be the same; no other record is held up by that."""
    same = usage_record(ended_at=FIRST + 1)
    await recorded(database, tmp_path, same, same, usage_record(ended_at=FIRST + 1))
    await recorded(database, tmp_path, same, usage_record(ended_at=FIRST + 1))
    for exact in (True, False):
        (total,) = await report(database, UsageQuery(FIRST, NOW), monkeypatch, exact=exact)
        assert total["requests"] == 3


async def test_the_migration_sums_what_there_is(source: DatabaseSource, tmp_path: Path) -> None:
    """As the recorder does with each record."""
    database = await open_database(source)
    await recorded(database, tmp_path, *random_records(random.Random(3), 100))
    asked = select(USAGE_DAYS).order_by(*USAGE_DAYS.primary_key)
    async with database.writing() as connection:
        before = (await connection.execute(asked)).all()
        for table in ("usage_days", "drained_nodes", "held_models", "decisions_version"):  # of this migration and later
            await connection.execute(text(f"DROP TABLE {table}"))
        await connection.execute(text("UPDATE alembic_version SET version_num = '0004'"))
    await database.close()
    database = await open_database(source)
    async with database.reading() as connection:
        after = (await connection.execute(asked)).all()
    await database.close()
    assert [tuple(row) for row in after] == [tuple(map(pytest.approx, row)) for row in before]


ENDLESS = text("(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT (x + 1) % 1000 FROM c) SELECT x FROM c) AS endless")


async def test_a_report_that_takes_too_long_is_stopped(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the database too: the next one finds it idle. While others run, a report waits as long at most."""
    monkeypatch.setattr(database_reports, "REPORT_SECS", 0.05)
    reports = DatabaseReports(database, lambda: 0)
    with monkeypatch.context() as patched:
        patched.setattr(database_reports, "totals", lambda *_, **__: select(func.count()).select_from(ENDLESS))
        for _ in range(database_reports.AT_ONCE + 1):
            with pytest.raises(InvalidRequest, match="takes longer than"):
                await reports.reports([UsageQuery(0, NOW)], "EUR")
    monkeypatch.setattr(database_reports, "REPORT_SECS", 20.0)
    assert len((await reports.reports([UsageQuery(0, NOW)], "EUR"))[0]) == 1
    monkeypatch.setattr(database_reports, "REPORT_SECS", 0.01)
    for _ in range(database_reports.AT_ONCE):
        await reports._places.acquire()
    with pytest.raises(Unavailable, match="other reports"):
        await reports.reports([UsageQuery(0, NOW)], "EUR")


SLOW = text(
    "(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000) SELECT x FROM c) AS slow"
)


async def test_the_time_of_a_report_is_that_of_all_its_queries(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the thousand takes as long alone. The database has stopped the last one afterwards, too."""
    reports = DatabaseReports(database, lambda: 0)
    monkeypatch.setattr(database_reports, "REPORT_SECS", 1.0)
    monkeypatch.setattr(database_reports, "totals", lambda *_, **__: select(func.count()).select_from(SLOW))
    with pytest.raises(InvalidRequest, match="takes longer than 1 s"):
        await reports.reports([UsageQuery(0, NOW)] * 1000, "EUR")
    if database.is_postgresql:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%AS slow%'"
        own = " AND pid <> pg_backend_pid() AND datname = current_database()"
        while await database.number(asked + own):
            pass


def test_percentiles_of_classes() -> None:
    """Within the class of the true one; none without durations, and the last class has no end."""
    assert percentile([0] * CLASSES, 95) is None
    for secs in (0.0, 0.01, 0.0100001, 3.0, UPPER_SECS[-1], 1e6):
        counts = [0] * CLASSES
        counts[class_of(secs)] = 10
        found = percentile(counts, 95)
        assert found is not None
        assert class_of(found) == class_of(secs)


def test_what_is_read_from_records() -> None:
    """Only parts of days, and of today nothing if the report goes on until now."""
    begin, end = FIRST + 100, FIRST + 3 * DAY + 100
    query, days = UsageQuery(begin, end), TimeSpan(FIRST + DAY, FIRST + 3 * DAY)
    first = TimeSpan(begin, FIRST + DAY)
    assert times_of(query, 0.0) == ((first, TimeSpan(FIRST + 3 * DAY, end)), days)
    today = days._replace(until=FIRST + 4 * DAY)
    assert times_of(replace(query, is_open=True), 0.0) == ((first,), today)
    assert times_of(query, FIRST + DAY) == ((TimeSpan(FIRST + 3 * DAY, end),), days._replace(since=FIRST))
    assert times_of(replace(query, until=FIRST + 200), 0.0) == ((TimeSpan(begin, FIRST + 200),), TimeSpan(0, 0))
    assert parse_query([], NOW).is_open
    assert not parse_query([("to", "1h")], NOW).is_open
