"""The files in which usage records wait for the database: `<time>-<process>-<random>.jsonl`, a line for each record.

The first line is the price list that all records of the file are charged by. The writer holds a lock (flock) on its
file, so that the kernel tells when the writer is gone, however it ended. A file is given its name once it is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cortex.accounts.prices import PriceList
from cortex.accounts.usage.record import UsageRecord

USAGE_DIRECTORY: Final = "usage"
"""In the state directory: what is on its way to the database."""
SUFFIX: Final = ".jsonl"
UNNAMED_SUFFIX: Final = ".new"
MAX_FILE_BYTES: Final = 4 << 20
"""A writer begins another file then, so that the first can be deleted once it is in the database."""
MAX_TOTAL_BYTES: Final = 1 << 30
"""Of all files together: several million requests. No file is begun beyond that."""
CHUNK: Final = 128
"""Records in one write: a thread that encodes lets no other run."""

ABANDONED_SECS: Final = 60.0
PART_BYTES: Final = 1 << 18
"""How much is read at a time."""

_ENCODER: Final = msgspec.json.Encoder()
_RECORDS: Final = msgspec.json.Decoder(UsageRecord)
_PRICES: Final = msgspec.json.Decoder(PriceList)


class JournalWriter:
    """Writes records to one file after another. For one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None
        self._size = 0
        self._prices: PriceList | None = None  # of the file
        self._rest = b""  # of a line, after a write that failed
        self.problem = ""
        """Why the last write failed; empty if it did not."""

    def write(self, records: Sequence[UsageRecord], prices: PriceList) -> int:
        """Writes the records, as far as possible. Returns how many of them, from the first, need not be given again:
        what is left of those is written by the next call. Blocks."""
        taken = 0
        try:
            self._put(b"")  # the rest of a line, before another file is begun
            while taken < len(records):
                if self._fd is None or prices != self._prices or self._size > MAX_FILE_BYTES or self._is_deleted():
                    self._begin(prices)
                chunk = records[taken : taken + CHUNK]
                data = _encoded(chunk)
                taken += len(chunk)
                self._put(data)
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or str(error)
        return taken

    @property
    def unwritten(self) -> int:
        """How many of the records that `write` has taken are not in the file."""
        return self._rest.count(b"\n")

    def close(self) -> None:
        """Lets the recorder delete the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._rest = b""

    def _put(self, data: bytes) -> None:
        assert self._fd is not None or not (data or self._rest)
        self._rest += data
        while self._rest and self._fd is not None:
            written = os.write(self._fd, self._rest)
            self._rest = self._rest[written:]
            self._size += written

    def _is_deleted(self) -> bool:
        """The file, or its directory, has been deleted."""
        assert self._fd is not None
        return os.fstat(self._fd).st_nlink == 0

    def _begin(self, prices: PriceList) -> None:
        self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if total_bytes(self._directory) >= MAX_TOTAL_BYTES:
            limit = f"{MAX_TOTAL_BYTES >> 20} MiB of usage wait for the database there, which is the limit"
            raise OSError(errno.EDQUOT, limit)
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}"
        path = self._directory / f"{name}{UNNAMED_SUFFIX}"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            header = _ENCODER.encode(prices) + b"\n"
            if os.write(fd, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            path.rename(self._directory / f"{name}{SUFFIX}")
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self._fd, self._size, self._prices = fd, len(header), prices


def total_bytes(directory: Path) -> int:
    """The size of all files in the directory. Blocks."""
    with os.scandir(directory) as entries:
        return sum(_size(entry) for entry in entries)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # the recorder has just deleted it
        return 0


def _encoded(records: Sequence[UsageRecord]) -> bytes:
    try:
        return _ENCODER.encode_lines(records)
    except UnicodeEncodeError:  # a client may name a model with half a character
        return _ENCODER.encode_lines([_whole_characters(record) for record in records])


def _whole_characters(record: UsageRecord) -> UsageRecord:
    texts = {name: value for name, value in msgspec.structs.asdict(record).items() if isinstance(value, str)}
    whole = {name: value.encode(errors="replace").decode() for name, value in texts.items()}
    return msgspec.structs.replace(record, **whole)


class JournalPart(NamedTuple):
    """Some records of a journal. `end`: where the next part begins. `broken`: lines that cannot be read. `is_last`:
    nothing will follow, because the file has been read and its writer is gone."""

    prices: PriceList
    records: list[UsageRecord]
    end: int
    broken: int
    is_last: bool


def journals(directory: Path) -> list[Path]:
    """The journals of the directory, the oldest first. Blocks."""
    return sorted(directory.glob(f"*{SUFFIX}"))


def read_part(path: Path, position: int) -> JournalPart:
    """What follows `position`, up to the last whole line. Blocks.

    Raises:
        OSError: the file is gone, or cannot be read.
    """
    with path.open("rb") as file:
        writer_is_gone = try_lock(file.fileno())  # before reading, or its last lines could be missed
        header = file.readline()
        file.seek(max(position, len(header)))
        data = file.read(PART_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and len(data) == PART_BYTES:
        whole = data  # too long for a line of ours
    lines = whole.splitlines()
    records = list(_decoded(lines))
    try:
        prices = _PRICES.decode(header)
    except msgspec.DecodeError:
        prices = PriceList("", {})
    end = max(position, len(header)) + len(whole)
    return JournalPart(prices, records, end, len(lines) - len(records), writer_is_gone and len(data) < PART_BYTES)


def _decoded(lines: Sequence[bytes]) -> Iterator[UsageRecord]:
    for line in lines:
        try:
            yield _RECORDS.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def try_lock(fd: int) -> bool:
    """Locks the file until it is closed. False if another has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def delete_abandoned(directory: Path) -> None:
    """Deletes what writers have left that ended before their file had its name. Blocks."""
    for path in directory.glob(f"*{UNNAMED_SUFFIX}"):
        try:
            with path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SECS and try_lock(file.fileno()):
                    path.unlink()
        except FileNotFoundError:
            continue  # it has its name now
