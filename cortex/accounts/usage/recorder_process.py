"""The control's side of the recorder, a process of its own: neither the disk nor the database delays the control."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import msgspec

from cortex.accounts.database.source import DatabaseSource
from cortex.config.live import LiveConfig
from shared.logs import LogFormat
from shared.system.kept_process import KeptProcess

MODULE: Final = "cortex.accounts.usage"
STOP_SECS: Final = 10.0
"""For its last records. Longer than it takes for them by itself."""


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
        self._process = KeptProcess(
            "the usage recorder",
            MODULE,
            first_line=self._settings,
            on_line=tell_problem,
            on_failure=tell_problem,
            stop_secs=STOP_SECS,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It runs inside the body, and moves what is left before this ends. End the workers before."""
        async with self._process.running():
            unsubscribe = self._live.changes.subscribe(lambda: self._process.tell(self._settings()))
            try:
                yield
            finally:
                unsubscribe()

    def _settings(self) -> bytes:
        config, source = self._live.config, self._source
        return msgspec.json.encode(
            RecorderSettings(
                directory=str(self._directory),
                database_file=None if source.path is None else str(source.path),
                database_url=source.url,
                database_shown=source.shown,
                retention_days=config.usage.retention_days,
                daily_retention_days=config.usage.daily_retention_days,
                log_level=config.log_level,
                log_format=config.log_format,
            )
        )
