"""The journal: records reach a file soon and whole, and nothing about a disk harms requests."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cortex.accounts.prices import PriceList, Prices
from cortex.accounts.usage import journal, journal_file
from cortex.accounts.usage.journal import UsageJournal
from cortex.accounts.usage.journal_file import JournalWriter
from cortex.accounts.usage.record import UsageRecord
from shared.logs import add_request_id
from shared.request_ids import request_scope
from tests.cortex.accounts.usage.records import usage_record
from tests.cortex.raw_http import until

PRICES = PriceList("EUR", {"org/small": Prices(1.0, 0.1, 2.0)})


def read(path: Path) -> tuple[PriceList, list[UsageRecord]]:
    """What a journal file says."""
    header, *lines = path.read_bytes().splitlines()
    records = [msgspec.json.decode(line, type=UsageRecord) for line in lines]
    return msgspec.json.decode(header, type=PriceList), records


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def no_drops(count: int) -> None:
    raise AssertionError(f"{count} dropped")


@dataclass
class SmallDisk:
    """Takes so many bytes, then it is full."""

    room: int
    write_to_disk: Callable[[int, bytes], int]

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write_to_disk(fd, data[: self.room])
        self.room -= written
        return written


def small_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> SmallDisk:
    disk = SmallDisk(room, os.write)
    monkeypatch.setattr(os, "write", disk.write)
    return disk


async def test_records_reach_the_file_while_the_journal_is_open(tmp_path: Path) -> None:
    """They do not wait for more records, nor for the end."""
    usage = UsageJournal(tmp_path / "usage", PRICES, no_drops)
    records = [usage_record() for _ in range(500)]
    for record in records:
        usage.add(record)
    await until(lambda: bool(files(tmp_path / "usage")))
    (path,) = files(tmp_path / "usage")
    await until(lambda: path.read_bytes().count(b"\n") == 501)
    assert read(path) == (PRICES, records)
    await usage.close()


async def test_close_writes_what_is_in_memory(tmp_path: Path) -> None:
    """A worker that stops in good order loses nothing, also while an earlier batch is being written."""
    usage = UsageJournal(tmp_path, PRICES, no_drops)
    records = [usage_record() for _ in range(10)]
    usage.add(records[0])
    usage._write()
    for record in records[1:]:
        usage.add(record)
    await usage.close()
    (path,) = files(tmp_path)
    assert read(path) == (PRICES, records)


async def test_new_prices_begin_another_file(tmp_path: Path) -> None:
    """Each file has the prices of its records, and is closed when they change."""
    usage = UsageJournal(tmp_path, PRICES, no_drops)
    usage.add(usage_record())
    usage._write()
    await until(lambda: bool(files(tmp_path)))
    dearer = PriceList("EUR", {"org/small": Prices(2.0)})
    usage.use_prices(dearer)
    usage.add(usage_record())
    await usage.close()
    assert [(prices, len(records)) for prices, records in map(read, files(tmp_path))] == [(PRICES, 1), (dearer, 1)]


async def test_records_wait_in_memory_while_the_directory_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, drops the oldest beyond the limit, counts them, and goes on once it can write."""
    (tmp_path / "usage").touch()  # not a directory
    dropped: list[int] = []
    usage = UsageJournal(tmp_path / "usage", PRICES, dropped.append, max_pending=100, retry_secs=0.01)
    records = [usage_record() for _ in range(130)]
    for record in records:
        usage.add(record)
    await until(lambda: bool(dropped))
    assert sum(dropped) == 30
    (tmp_path / "usage").unlink()
    await until(lambda: bool(files(tmp_path / "usage")))
    await usage.close()
    (path,) = files(tmp_path / "usage")
    assert read(path) == (PRICES, records[30:])
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "File exists" in caplog.text
    assert "30 records were dropped" in caplog.text


async def test_what_a_full_disk_loses_at_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also records that the writer has taken, some of one in the file. The message has no request's id."""
    caplog.handler.addFilter(add_request_id)
    small_disk(monkeypatch, 1000)
    monkeypatch.setattr(journal, "WRITE_AFTER_SECS", 0.01)
    usage = UsageJournal(tmp_path, PRICES, no_drops)
    with request_scope("some-request"):
        for _ in range(10):
            usage.add(usage_record())
    await until(lambda: "cannot be written" in caplog.text)
    await usage.close()
    (path,) = files(tmp_path)
    kept = path.read_bytes().count(b"\n") - 1
    assert 0 < kept < 10
    assert f"usage records are lost, at least {10 - kept}: " in caplog.messages[-1]
    assert [getattr(record, "request_id", "") for record in caplog.records] == [None, None]


async def test_records_that_a_bug_loses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a bug")

    dropped: list[int] = []
    usage = UsageJournal(tmp_path, PRICES, dropped.append)
    with monkeypatch.context() as patched:
        patched.setattr(usage._writer, "write", broken)
        for _ in range(3):
            usage.add(usage_record())
        usage._write()
        await until(lambda: usage._writing is None)
    assert dropped == [3]
    assert "RuntimeError: a bug" in caplog.text
    last = usage_record()
    usage.add(last)
    await usage.close()
    assert read(files(tmp_path)[0]) == (PRICES, [last])


async def test_a_write_that_stops_in_the_middle_of_a_line_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a while leaves no broken line and no record twice, although the reader may have had the
    first part already."""
    writer, disk = JournalWriter(tmp_path), small_disk(monkeypatch, 1000)
    monkeypatch.setattr(journal_file, "CHUNK", 10)
    records = [usage_record() for _ in range(50)]
    taken = writer.write(records, PRICES)
    assert writer.problem == "No space left on device"
    assert taken < len(records)
    disk.room = 100_000
    assert writer.write(records[taken:], PRICES) == len(records) - taken
    assert writer.problem == ""
    writer.close()
    (path,) = files(tmp_path)
    assert read(path) == (PRICES, records)


def test_a_full_file_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first can be deleted."""
    monkeypatch.setattr(journal_file, "MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr(journal_file, "CHUNK", 10)
    records = [usage_record() for _ in range(200)]
    writer = JournalWriter(tmp_path)
    assert writer.write(records, PRICES) == 200
    writer.close()
    assert len(files(tmp_path)) > 2
    assert [record for path in files(tmp_path) for record in read(path)[1]] == records


def test_the_files_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is away they do not fill the disk."""
    monkeypatch.setattr(journal_file, "MAX_TOTAL_BYTES", 50_000)
    monkeypatch.setattr(journal_file, "MAX_FILE_BYTES", 10_000)
    writer = JournalWriter(tmp_path)
    records = [usage_record() for _ in range(2000)]
    assert writer.write(records, PRICES) < len(records)
    assert "the limit" in writer.problem
    assert journal_file.total_bytes(tmp_path) < 100_000
    writer.close()


def test_a_deleted_directory_is_created_again(tmp_path: Path) -> None:
    """Records do not vanish in a file without a name."""
    directory = tmp_path / "usage"
    writer = JournalWriter(directory)
    writer.write([usage_record()], PRICES)
    shutil.rmtree(directory)
    record = usage_record()
    assert writer.write([record], PRICES) == 1
    writer.close()
    (path,) = files(directory)
    assert read(path) == (PRICES, [record])
