"""A worker's usage records on their way to the database: in memory for a moment, then in files of the worker's own.

The recorder (`cortex.accounts.usage.recorder`) moves what is in the files into the database and deletes those whose
writer is gone. A request only appends to a list; a thread writes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from cortex.accounts.prices import PriceList
from cortex.accounts.usage.journal_file import JournalWriter
from cortex.accounts.usage.record import UsageRecord
from shared.request_ids import request_scope

WRITE_AFTER_SECS: Final = 0.5
"""How long records stay in memory: what a killed worker loses."""
RETRY_SECS: Final = 1.0
CLOSE_SECS: Final = 5.0
"""How long a disk that does not answer may delay the end."""
MAX_PENDING: Final = 20_000
"""Records kept in memory while they cannot be written. The oldest are dropped first."""

log = logging.getLogger(__name__)


class UsageLog(Protocol):
    """Where a worker's requests leave their usage."""

    def add(self, record: UsageRecord) -> None:
        """Keeps the record of a request that has ended. Never waits and never fails."""

    def use_prices(self, prices: PriceList) -> None:
        """What the tokens of later records cost."""

    async def close(self) -> None:
        """Writes what is still in memory."""


class NoUsageLog:
    """Implements UsageLog for a cortex that has no directory to keep usage in."""

    def add(self, record: UsageRecord) -> None:
        pass

    def use_prices(self, prices: PriceList) -> None:
        pass

    async def close(self) -> None:
        pass


class UsageJournal:
    """Implements UsageLog with files in a directory. Needs a running loop."""

    def __init__(
        self,
        directory: Path,
        prices: PriceList,
        count_dropped: Callable[[int], None],
        *,
        max_pending: int = MAX_PENDING,
        retry_secs: float = RETRY_SECS,
    ) -> None:
        """`count_dropped` is told how many records were dropped, each time some are."""
        self._directory = directory
        self._max_pending = max_pending
        self._retry_secs = retry_secs
        self._count_dropped = count_dropped
        self._pending: list[UsageRecord] = []
        self._prices = prices
        self._writer = JournalWriter(directory)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="usage journal")
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[int] | None = None
        self._failed = False
        self._dropped = 0  # since it failed

    def add(self, record: UsageRecord) -> None:
        self._pending.append(record)
        if self._timer is None:
            with request_scope(None):  # what fails then concerns all
                self._timer = self._loop.call_later(WRITE_AFTER_SECS, self._write)

    def use_prices(self, prices: PriceList) -> None:
        self._prices = prices

    async def close(self) -> None:
        for _ in range(2):  # what is being written, then the rest
            self._start_writing()
            if self._writing is not None:
                await asyncio.wait([self._writing], timeout=CLOSE_SECS)
        if self._timer is not None:
            self._timer.cancel()
        lost = len(self._pending) + self._writer.unwritten
        if lost or self._writing is not None:
            log.error("usage records are lost, at least %d: %s takes no more", lost, self._directory)
        self._executor.submit(self._writer.close)
        self._executor.shutdown(wait=False)

    def _write(self) -> None:
        self._timer = None
        self._start_writing()
        self._drop_excess()
        if self._pending:
            self._write_in(WRITE_AFTER_SECS)

    def _write_in(self, secs: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(secs, self._write)

    def _start_writing(self) -> None:
        """Hands what is pending to the thread, unless it is still writing."""
        if self._writing is None and (self._pending or self._failed):
            records, self._pending = self._pending, []
            self._writing = self._loop.run_in_executor(self._executor, self._writer.write, records, self._prices)
            self._writing.add_done_callback(lambda written: self._written(records, written))

    def _written(self, records: list[UsageRecord], written: asyncio.Future[int]) -> None:
        self._writing = None
        try:
            taken = written.result()
        except Exception:
            log.exception("bug while writing usage; up to %d records are lost", len(records))
            self._count_dropped(len(records))
            return
        self._pending = records[taken:] + self._pending
        problem = self._writer.problem
        if problem:
            self._drop_excess()
            self._write_in(self._retry_secs)
        if problem and not self._failed:
            log.error(
                "usage cannot be written to %s: %s; up to %d records are kept in memory, older ones are dropped",
                self._directory,
                problem,
                self._max_pending,
            )
        elif self._failed and not problem:
            log.warning("usage is written to %s again; %d records were dropped", self._directory, self._dropped)
            self._dropped = 0
        self._failed = bool(problem)

    def _drop_excess(self) -> None:
        excess = len(self._pending) - self._max_pending
        if excess > 0:
            del self._pending[:excess]
            self._dropped += excess
            self._count_dropped(excess)
