"""The recorder: each record is in the database once, after any end of any process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Table, func, select, text

from cortex.accounts.database.database import Database
from cortex.accounts.database.limit_states import LimitStates
from cortex.accounts.database.source import DatabaseError, DatabaseSource, database_source
from cortex.accounts.database.tables import LIMIT_STATES, USAGE, USAGE_JOURNALS
from cortex.accounts.prices import PriceList, Prices
from cortex.accounts.usage.__main__ import _Process
from cortex.accounts.usage.journal_file import JournalWriter, journals
from cortex.accounts.usage.record import UsageRecord
from cortex.accounts.usage.recorder import Recorder
from cortex.accounts.usage.recorder_process import MODULE, RecorderProcess, RecorderSettings
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from tests.cortex.accounts.usage.records import usage_record

PRICES = PriceList("EUR", {"org/small": Prices(1.0, 0.5, 2.0)})


async def ids(database: Database) -> list[str]:
    """The ids of the recorded requests, sorted."""
    async with database.reading() as connection:
        return sorted((await connection.execute(select(USAGE.c.request_id))).scalars())


async def count(database: Database, table: Table) -> int:
    async with database.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


def sorted_ids(*records: UsageRecord) -> list[str]:
    return sorted(record.request_id for record in records)


async def test_records_become_rows_with_their_cost(database: Database, tmp_path: Path) -> None:
    """All fields are kept; the cost is that of the prices in the journal; without counts or a price there is none."""
    writer = JournalWriter(tmp_path)
    priced = usage_record(prompt_tokens=1_000_000, cached_tokens=400_000, completion_tokens=500_000)
    uncounted = usage_record(prompt_tokens=None, cached_tokens=None, completion_tokens=None, first_byte_secs=None)
    free = usage_record(model="org/free")
    odd = usage_record(model="a\0b", path="/\ud800", prompt_tokens=2**40)
    writer.write([priced, uncounted, free, odd], PRICES)
    await Recorder(database, tmp_path).move()
    async with database.reading() as connection:
        rows = {row.request_id: row._mapping for row in await connection.execute(select(USAGE))}
    row = rows[priced.request_id]
    assert {name: row[name] for name in priced.__struct_fields__} == {
        name: getattr(priced, name) for name in priced.__struct_fields__
    }
    assert (row["cost"], row["currency"], row["energy_wh"]) == (pytest.approx(0.6 + 0.2 + 1.0), "EUR", None)
    assert (rows[uncounted.request_id]["cost"], rows[uncounted.request_id]["currency"]) == (None, None)
    assert rows[free.request_id]["cost"] is None
    assert (rows[odd.request_id]["model"], rows[odd.request_id]["path"]) == ("a\ufffdb", "/?")
    writer.close()


async def test_a_journal_is_deleted_once_its_writer_is_gone(database: Database, tmp_path: Path) -> None:
    """Not before, and not with lines that are not in the database."""
    recorder, writer = Recorder(database, tmp_path), JournalWriter(tmp_path)
    first, second = usage_record(), usage_record()
    writer.write([first], PRICES)
    await recorder.move()
    (path,) = journals(tmp_path)
    writer.write([second], PRICES)
    writer.close()
    await recorder.move()
    assert await ids(database) == sorted_ids(first, second)
    assert not path.exists()
    assert await count(database, USAGE_JOURNALS) == 0


async def test_half_a_line_waits_and_is_dropped_with_its_writer(database: Database, tmp_path: Path) -> None:
    """A writer that is killed in the middle of a write leaves the lines before."""
    recorder, writer = Recorder(database, tmp_path), JournalWriter(tmp_path)
    records = [usage_record() for _ in range(3)]
    writer.write(records[:2], PRICES)
    (path,) = journals(tmp_path)
    with path.open("ab") as file:
        file.write(b"[18000000")
    await recorder.move()
    assert await ids(database) == sorted_ids(*records[:2])
    assert path.exists()
    writer.close()
    await recorder.move()
    assert await ids(database) == sorted_ids(*records[:2])
    assert not path.exists()


async def test_a_broken_line_stops_nothing(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left out, and said."""
    recorder, writer = Recorder(database, tmp_path), JournalWriter(tmp_path)
    records = [usage_record() for _ in range(2)]
    writer.write(records[:1], PRICES)
    (path,) = journals(tmp_path)
    with path.open("ab") as file:
        file.write(b"\0\0\0\xff\n[1]\n")
    writer.write(records[1:], PRICES)
    await recorder.move()
    assert await ids(database) == sorted_ids(*records)
    assert "2 lines of" in caplog.text
    writer.close()


async def test_a_transaction_that_fails_moves_nothing(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and position are written together, so the next attempt neither misses nor repeats any."""
    recorder, writer = Recorder(database, tmp_path), JournalWriter(tmp_path)
    records = [usage_record() for _ in range(100)]
    writer.write(records[:50], PRICES)
    await recorder.move()
    writer.write(records[50:], PRICES)
    async with database.writing() as connection:
        await connection.execute(text("ALTER TABLE usage_journals RENAME TO away"))
    with pytest.raises(DatabaseError):
        await recorder.move()
    assert await ids(database) == sorted_ids(*records[:50])
    async with database.writing() as connection:
        await connection.execute(text("ALTER TABLE away RENAME TO usage_journals"))
    await recorder.move()
    assert await ids(database) == sorted_ids(*records)
    writer.close()


async def test_old_records_are_deleted_in_batches(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that are too old; none without a limit."""
    monkeypatch.setattr("cortex.accounts.usage.recorder.DELETED_AT_ONCE", 10)
    now = 1_800_000_000.0
    recorder, writer = Recorder(database, tmp_path, lambda: now), JournalWriter(tmp_path)
    old = [usage_record(ended_at=now - 86_400 * 8 - number) for number in range(25)]
    fresh = [usage_record(ended_at=now - 86_400 * 6) for _ in range(5)]
    writer.write([*old, *fresh], PRICES)
    await recorder.move()
    assert not await recorder.delete_old(0)
    assert len(await ids(database)) == 30
    assert await recorder.delete_old(7)
    assert len(await ids(database)) == 20
    while await recorder.delete_old(7):
        pass
    assert await ids(database) == sorted_ids(*fresh)
    writer.close()


_WRITE = """
import sys, time
from pathlib import Path
from cortex.accounts.usage.journal_file import JournalWriter
from tests.cortex.accounts.usage.records import usage_record
from tests.cortex.accounts.usage.test_recorder import PRICES
writer, number = JournalWriter(Path(sys.argv[1])), 0
while True:
    writer.write([usage_record(request_id=f"{sys.argv[2]}-{number + each}") for each in range(10)], PRICES)
    number += 10
    print(number, flush=True)  # these are in the file
    time.sleep(0.002)
"""


@contextlib.contextmanager
def started(*arguments: str, settings: bytes = b"") -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, with this input so far."""
    with subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(settings)
        process.stdin.flush()
        yield process
        process.kill()


def written_before_kill(writer: subprocess.Popen[bytes]) -> int:
    """Kills the writer once it has written; how many records it had certainly written."""
    assert writer.stdout is not None
    first = writer.stdout.readline()
    writer.kill()
    return int([first, *writer.stdout.read().split()][-1])


async def has_more(database: Database, rows: int) -> None:
    """Waits for more rows than these."""
    while await count(database, USAGE) <= rows:
        pass


def settings_of(source: DatabaseSource, directory: Path) -> bytes:
    settings = RecorderSettings(
        directory=str(directory),
        database_file=None if source.path is None else str(source.path),
        database_url=source.url,
        database_shown=source.shown,
        retention_days=0,
        daily_retention_days=0,
        log_level="info",
        log_format="text",
    )
    return msgspec.json.encode(settings) + b"\n"


async def test_a_recorder_that_cannot_be_started_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    told: asyncio.Queue[str] = asyncio.Queue()
    live = LiveConfig(CortexConfig(), Catalogue())
    async with RecorderProcess(live, DatabaseSource(tmp_path / "db", "", ""), tmp_path, told.put_nowait).running():
        assert await told.get() == "the usage recorder cannot be started: No such file or directory"


async def test_a_new_reason_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a recorder that fails again and again. At its start also that nothing is wrong."""
    place, source = tmp_path / "place", database_source(None, tmp_path)
    assert source is not None
    process = _Process(msgspec.json.decode(settings_of(source, place / "usage"), type=RecorderSettings))
    place.touch()
    for _ in range(2):
        assert not await process._moved()
    place.unlink()
    place.mkdir()
    (place / "usage").touch()
    assert not await process._moved()
    (place / "usage").unlink()
    assert not await process._moved()
    process.stop.set()
    await process.run()
    reasons = capsys.readouterr().out.splitlines()
    assert ["Not a directory" in reasons[0], "File exists" in reasons[1], *reasons[2:]] == [True, True, ""]


async def test_settings_that_cannot_be_read_end_the_recorder(source: DatabaseSource, tmp_path: Path) -> None:
    """cortex starts another. It must not run on without listening to the end of its input."""
    given = settings_of(source, tmp_path / "usage") + b'{"directory": 1}\n'
    with started("-m", MODULE, settings=given) as recorder:
        assert await asyncio.to_thread(recorder.wait, 60) == 0


async def test_limits_that_were_not_used_for_long_are_deleted(database: Database, tmp_path: Path) -> None:
    """Their rows say no more than none. One with a rolling window that is longer stays until that is over."""
    day, states = 86_400.0, LimitStates(database)
    month, year = "tokens/month", f"EUR/{365 * day}"
    rows: list[tuple[str, list[str], int]] = [
        ("key:old", [month], 0),
        ("key:rates", [], 0),
        ("key:year", [month, year], 0),
        ("key:new", [], 30),
    ]
    async with database.writing() as connection:
        for scope, budgets, at in rows:
            state = {"at": at * day, "budgets": {name: {} for name in budgets}}
            await connection.execute(LIMIT_STATES.insert().values(scope=scope, state=state, updated_at=at * day))
    await Recorder(database, tmp_path, lambda: 40 * day).delete_old(0)
    assert set(await states.all()) == {"key:year", "key:new"}
    await Recorder(database, tmp_path, lambda: 400 * day).delete_old(0)
    assert await states.all() == {}


async def test_kills_lose_and_repeat_nothing(source: DatabaseSource, database: Database, tmp_path: Path) -> None:
    """Writers and recorders are killed again and again, at any moment; in the end each record is there once."""
    directory = tmp_path / "usage"
    settings = settings_of(source, directory)
    written: dict[str, int] = {}
    for name in ("a", "b"):
        with started("-c", _WRITE, str(directory), name) as writer:
            before = await count(database, USAGE)
            with started("-m", MODULE, settings=settings):
                await has_more(database, before + 50)
            written[name] = written_before_kill(writer)
    with started("-m", MODULE, settings=settings) as recorder:
        assert recorder.stdin is not None
        recorder.stdin.close()
        await asyncio.to_thread(recorder.wait)
    found = await ids(database)
    assert len(found) == len(set(found))
    assert {f"{name}-{each}" for name, number in written.items() for each in range(number)} <= set(found)
    assert journals(directory) == []
