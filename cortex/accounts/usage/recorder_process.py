"""The control's side of the recorder, a process of its own: neither the disk nor the database delays the control."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import msgspec

from cortex.accounts.database.source import DatabaseSource
from cortex.config.live import LiveConfig
from shared.logs import LogFormat
from shared.tasks import cancel_all, timeout

MODULE: Final = "cortex.accounts.usage"
STOP_SECS: Final = 10.0
"""For its last records. Longer than it takes for them by itself."""
RESTART_SECS: Final = 1.0

log = logging.getLogger(__name__)


class RecorderSettings(msgspec.Struct, frozen=True):
    """What the recorder is told. The database's fields are those of a `DatabaseSource`; they can have a password, so
    they do not go into its arguments."""

    directory: str
    database_file: str | None
    database_url: str
    database_shown: str
    retention_days: int
    daily_retention_days: int
    log_level: str
    log_format: LogFormat


class RecorderProcess:
    """Keeps the recorder running."""

    def __init__(
        self, live: LiveConfig, source: DatabaseSource, directory: Path, tell_problem: Callable[[str], None]
    ) -> None:
        """For the journals in `directory`. `tell_problem` is told why the database cannot be written, and "" once it
        can."""
        self._live = live
        self._source = source
        self._directory = directory
        self._tell_problem = tell_problem
        self._process: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It runs inside the body, and moves what is left before this ends. End the workers before."""
        unsubscribe = self._live.changes.subscribe(self._tell)
        keeper = asyncio.create_task(self._keep_running(), name="usage recorder")
        try:
            yield
        finally:
            unsubscribe()
            await cancel_all([keeper])
            await self._end()

    def _tell(self) -> None:
        config, source = self._live.config, self._source
        settings = RecorderSettings(
            directory=str(self._directory),
            database_file=None if source.path is None else str(source.path),
            database_url=source.url,
            database_shown=source.shown,
            retention_days=config.usage.retention_days,
            daily_retention_days=config.usage.daily_retention_days,
            log_level=config.log_level,
            log_format=config.log_format,
        )
        process = self._process
        # uvloop raises RuntimeError for a pipe that it has closed, because the process has ended.
        with contextlib.suppress(OSError, RuntimeError):
            if process is not None and process.stdin is not None:
                process.stdin.write(msgspec.json.encode(settings) + b"\n")

    async def _keep_running(self) -> None:
        while True:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", MODULE),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for cortex
                )
            except OSError as error:
                log.warning("the usage recorder cannot be started: %s", error.strerror)
                self._tell_problem(f"the recorder cannot be started: {error.strerror}")
            else:
                self._tell()
                assert self._process.stdout is not None
                async for line in self._process.stdout:
                    self._tell_problem(line.decode("utf-8", "replace").strip())
                status = await self._process.wait()
                log.error("the usage recorder exited with status %d; restarting", status)
                self._tell_problem(f"the recorder exited with status {status}")
            await asyncio.sleep(RESTART_SECS)

    async def _end(self) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            async with timeout(STOP_SECS):
                await process.wait()
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
