"""Reports: sums over real databases of both kinds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.database import Database
from cortex.accounts.database.tables import USAGE_TOKENS
from cortex.accounts.prices import PriceList, Prices
from cortex.accounts.usage import database_reports
from cortex.accounts.usage.database_reports import DatabaseReports
from cortex.accounts.usage.journal_file import JournalWriter
from cortex.accounts.usage.organization import Kind, bucket_page, parse_bucket_query
from cortex.accounts.usage.query import GROUPS, UsageQuery
from cortex.accounts.usage.record import UsageRecord
from cortex.accounts.usage.recorder import Recorder
from shared.errors import InvalidRequest, Unavailable
from shared.protocol import ErrorCode
from tests.cortex.accounts.usage.records import usage_record
from tests.cortex.raw_http import until

DAY = 1_795_910_400  # 2026-11-29T00:00:00Z
PRICES = PriceList("EUR", {"a": Prices(1.0, 0.0, 2.0)})
EVERYTHING = UsageQuery(0, 2_000_000_000)


async def record(database: Database, directory: Path, *records: UsageRecord) -> DatabaseReports:
    writer = JournalWriter(directory)
    writer.write(records, PRICES)
    writer.close()
    await Recorder(database, directory).move()
    return DatabaseReports(database, lambda: 0)


def some_records() -> list[UsageRecord]:
    """Three requests of alice for a, one of bob for b a month later that failed."""
    alice = {"key_id": "k1", "key": "alice", "model": "a", "prompt_tokens": 1000, "cached_tokens": 100}
    times = (DAY + 1, DAY + 3599, DAY + 86_400)
    good = [
        usage_record(**alice, ended_at=float(at), completion_tokens=500, first_byte_secs=secs, cold=secs == 3.0)
        for at, secs in zip(times, (1.0, 2.0, 3.0), strict=True)
    ]
    nothing: dict[str, Any] = dict.fromkeys(
        ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "first_byte_secs")
    )
    failed = usage_record(
        key_id="k2", key="bob", model="b", node="", status=503, ended_at=DAY + 40 * 86_400.0, **nothing
    )
    return [*good, failed]


async def sums(reports: DatabaseReports, query: UsageQuery, currency: str) -> list[dict[str, Any]]:
    return (await reports.reports([query], currency))[0]


async def test_groups_and_totals(database: Database, tmp_path: Path) -> None:
    """Each group has its sums; without groups there is one row."""
    reports = await record(database, tmp_path, *some_records())
    first, second, bob = await sums(reports, replace(EVERYTHING, group_by=("key", "model", "day")), "EUR")
    assert (first["key"], first["model"], first["day"]) == ("alice", "a", "2026-11-29")
    assert (second["day"], bob["key"], bob["day"]) == ("2026-11-30", "bob", "2027-01-08")
    assert (first["requests"], first["errors"], first["cold_starts"]) == (2, 0, 0)
    assert [first[name] for name in USAGE_TOKENS] == [2000, 200, 1000, 4]
    assert first["cost"] == pytest.approx(2 * (900 * 1.0 + 500 * 2.0) / 1e6)
    assert (first["first_byte_secs_mean"], first["first_byte_secs_p95"]) == (1.5, 2.0)
    assert second["cold_starts"] == 1
    assert (bob["requests"], bob["errors"], bob["prompt_tokens"], bob["cost"]) == (1, 1, 0, 0.0)
    assert (bob["first_byte_secs_mean"], bob["first_byte_secs_p95"], bob["energy_wh"]) == (None, None, 0.0)
    (total,) = await sums(reports, EVERYTHING, "EUR")
    assert (total["requests"], total["prompt_tokens"], total["first_byte_secs_p95"]) == (4, 3000, 3.0)
    (in_dollars,) = await sums(reports, EVERYTHING, "USD")
    assert in_dollars["cost"] == 0.0


async def test_every_group_can_be_asked_for(database: Database, tmp_path: Path) -> None:
    """All at once too, with periods in UTC."""
    reports = await record(database, tmp_path, *some_records())
    for group in GROUPS:
        assert await sums(reports, replace(EVERYTHING, group_by=(group,)), "EUR")
    rows = await sums(reports, replace(EVERYTHING, group_by=GROUPS), "EUR")
    assert (rows[0]["hour"], rows[0]["month"], rows[0]["status"]) == ("2026-11-29T00:00Z", "2026-11", 200)


async def test_only_what_is_asked_for_counts(database: Database, tmp_path: Path) -> None:
    """Times (the end is excluded), keys by name or id, models, and the caller's own key."""
    reports = await record(database, tmp_path, *some_records())

    async def requests(**fields: Any) -> int:
        (total,) = await sums(reports, replace(EVERYTHING, **fields), "EUR")
        return int(total["requests"])

    assert await requests(since=DAY + 1, until=DAY + 3599) == 1
    assert await requests(keys=("alice",)) == await requests(keys=("k1",)) == 3
    assert await requests(models=("b", "c")) == 1
    assert await requests(key_id="k2") == 1
    assert await requests(key_id="") == 0


async def test_a_report_without_end_is_refused(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fill the memory of cortex."""
    monkeypatch.setattr(database_reports, "MAX_ROWS", 2)
    reports = await record(database, tmp_path, *some_records())
    with pytest.raises(InvalidRequest, match="more than 2 rows"):
        await sums(reports, replace(EVERYTHING, group_by=("hour",)), "EUR")


async def test_a_database_that_is_gone_is_said(database: Database, tmp_path: Path) -> None:
    """The client can try again."""
    reports = await record(database, tmp_path)
    async with database.writing() as connection:
        await connection.exec_driver_sql("ALTER TABLE usage RENAME TO away")
    with pytest.raises(Unavailable, match="cannot be read from") as caught:
        await sums(reports, EVERYTHING, "EUR")
    assert caught.value.code == ErrorCode.DATABASE_UNAVAILABLE


async def test_reports_of_one_key_leave_room_for_others(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = await record(database, tmp_path, *some_records())
    reading, go_on, read = database.reading, asyncio.Event(), 0

    @contextlib.asynccontextmanager
    async def slowly() -> AsyncIterator[AsyncConnection]:
        nonlocal read
        task = asyncio.current_task()
        if task is not None and task.get_name() == "user":
            read += 1
            await go_on.wait()
        async with reading() as connection:
            yield connection

    monkeypatch.setattr(database, "reading", slowly)
    own = replace(EVERYTHING, key_id="k1")
    tasks = [asyncio.create_task(sums(reports, own, "EUR"), name="user") for _ in range(database_reports.AT_ONCE + 1)]
    await until(lambda: read > 0)
    assert len(await sums(reports, EVERYTHING, "EUR")) == 1
    assert read == 1
    go_on.set()
    assert [len(found) for found in await asyncio.gather(*tasks)] == [1] * len(tasks)


async def page(reports: DatabaseReports, kind: Kind, **given: Any) -> dict[str, Any]:
    pairs = [
        (name, str(each))
        for name, value in given.items()
        for each in ([value] if not isinstance(value, list) else value)
    ]
    asked = parse_bucket_query(kind, pairs, DAY + 50 * 86_400.0)
    return bucket_page(asked, await sums(reports, asked.query, "EUR"), "EUR")


async def test_buckets_in_openais_shape(database: Database, tmp_path: Path) -> None:
    """Every bucket of the page is there, also those without requests; pages follow each other."""
    reports = await record(database, tmp_path, *some_records())
    first = await page(reports, "completions", start_time=DAY + 5, limit=3, **{"group_by[]": ["model", "api_key_id"]})
    assert [bucket["start_time"] for bucket in first["data"]] == [DAY, DAY + 86_400, DAY + 2 * 86_400]
    (result,) = first["data"][0]["results"]
    assert result["object"] == "organization.usage.completions.result"
    assert (result["model"], result["api_key_id"], result["num_model_requests"]) == ("a", "k1", 1)
    assert (result["input_tokens"], result["input_cached_tokens"], result["output_tokens"]) == (1000, 100, 500)
    assert first["data"][2]["results"] == []
    assert first["has_more"]
    second = await page(reports, "completions", start_time=DAY + 5, limit=3, page=first["next_page"])
    assert [bucket["start_time"] for bucket in second["data"]] == [DAY + each * 86_400 for each in (3, 4, 5)]
    last = await page(reports, "costs", start_time=DAY, limit=180, end_time=DAY + 86_400)
    assert (last["has_more"], last["next_page"]) == (False, None)
    assert last["data"][0]["results"][0]["amount"] == {"value": pytest.approx(3.8e-3), "currency": "eur"}
    assert (await page(reports, "embeddings", start_time=DAY))["data"][0]["results"] == []
    hours = await page(reports, "completions", start_time=DAY, bucket_width="1h", limit=2)
    assert [len(bucket["results"]) for bucket in hours["data"]] == [1, 0]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "start_time"),
        ({"start_time": "now"}, "start_time"),
        ({"start_time": "1", "bucket_width": "2d"}, "bucket_width"),
        ({"start_time": "1", "limit": "32"}, "limit"),
        ({"start_time": "1", "group_by": "colour"}, "group_by"),
        ({"start_time": "1", "page": "page_7"}, "page"),
        ({"start_time": "1", "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_query_of_buckets_is_explained(given: dict[str, str], param: str) -> None:
    """The error names the parameter."""
    with pytest.raises(InvalidRequest) as raised:
        parse_bucket_query("completions", given.items(), DAY)
    assert raised.value.param == param
