"""The recorder's process: `python -m cortex.accounts.usage`. Only the control starts it; ends with its input.

Reads a `RecorderSettings` per line of its input: the first to begin, later ones when the configuration has changed.
Writes a line of output when it fails, or fails for another reason, which says why, and an empty one when it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import Final

import msgspec

from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.source import DatabaseError, DatabaseSource
from cortex.accounts.usage.journal_file import try_lock
from cortex.accounts.usage.recorder import Recorder
from cortex.accounts.usage.recorder_process import RecorderSettings
from shared.logs import configure_logging
from shared.tasks import cancel_all, timeout

LOOK_SECS: Final = 0.25
"""Between two looks at the journals."""
RETRY_SECS: Final = 1.0
LAST_SECS: Final = 5.0
"""For what is left when cortex has ended. The rest waits for its next start."""
CLEAN_SECS: Final = 600.0
"""Between two searches for old rows."""
NICENESS: Final = 10
"""It gives way to requests."""
LOCK: Final = "recorder.lock"

log = logging.getLogger("cortex.accounts.usage")


class _Process:
    """Moves records until told to stop, over failures of the database."""

    def __init__(self, settings: RecorderSettings) -> None:
        self.settings = settings
        self.stop = asyncio.Event()
        self._directory = Path(settings.directory)
        self._database: Database | None = None
        self._recorder: Recorder | None = None
        self._lock: int | None = None
        self._clean_at = 0.0
        self._failed = False
        self._told: str | None = None

    async def run(self) -> None:
        while not self.stop.is_set():
            await self._pause(0 if await self._moved() else RETRY_SECS if self._failed else LOOK_SECS)
        try:
            async with timeout(LAST_SECS):
                while await self._moved():
                    pass
        except asyncio.TimeoutError:
            log.warning("some usage is still in the journals, the next start of cortex moves it")
        if self._database is not None:
            await self._database.close()

    async def _pause(self, secs: float) -> None:
        try:
            async with timeout(secs):
                await self.stop.wait()
        except asyncio.TimeoutError:
            pass

    async def _moved(self) -> bool:
        """Moves some of what is there. True if there is more to do at once."""
        try:
            more = await self._work()
        except (DatabaseError, OSError) as error:
            if not self._failed:
                log.warning(
                    "cannot write usage to the database; records stay in %s until it works: %s",
                    self.settings.directory,
                    error,
                )
            self._failed = True
            self._tell(str(error))
            return False
        if self._failed:
            log.warning("usage is recorded again")
            self._failed = False
        self._tell("")
        return more

    def _tell(self, problem: str) -> None:
        """Tells cortex what is new, at first also that there is no problem: the recorder before may have had one."""
        if problem != self._told:
            self._told = problem
            with contextlib.suppress(OSError):  # cortex is gone
                print(" ".join(problem.split()), flush=True)

    async def _work(self) -> bool:
        settings = self.settings
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_alone():
            return False
        if self._recorder is None:
            source = DatabaseSource(
                None if settings.database_file is None else Path(settings.database_file),
                settings.database_url,
                settings.database_shown,
            )
            database = await open_database(source)
            if database.read_only:  # it is opened again at the next try, when it may be writable
                await database.close()
                raise DatabaseError(f"{source.shown} cannot be written")
            self._database = database
            self._recorder = Recorder(self._database, self._directory)
        more = await self._recorder.move()
        if not more and monotonic() >= self._clean_at:
            more = await self._recorder.delete_old(settings.retention_days, settings.daily_retention_days)
            if not more:
                self._clean_at = monotonic() + CLEAN_SECS
        return more

    def _is_alone(self) -> bool:
        """The recorder of a killed cortex may still be at its last records."""
        if self._lock is None:
            fd = os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not try_lock(fd):
                os.close(fd)
                return False
            self._lock = fd
        return True


async def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it must outlive the workers
    os.nice(NICENESS)
    decoder = msgspec.json.Decoder(RecorderSettings)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    first = await reader.readline()
    if not first:
        return
    process = _Process(decoder.decode(first))
    configure_logging(process.settings.log_level, process.settings.log_format)

    async def follow() -> None:
        try:
            async for line in reader:
                process.settings = decoder.decode(line)
        except msgspec.DecodeError as error:
            log.error("cannot read the settings from cortex; restart cortex if it was upgraded: %s", error)  # noqa: TRY400
        finally:
            process.stop.set()

    following = asyncio.create_task(follow(), name="input")
    try:
        await process.run()
    finally:
        await cancel_all([following])


if __name__ == "__main__":
    asyncio.run(_main())
