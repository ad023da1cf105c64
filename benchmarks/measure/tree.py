"""CPU time and memory of a contender's whole process tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from tests.processes import descendants

_SAMPLE_SECS = 0.25
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessTree:
    """A process and all that it started, also those processes and threads that have ended since.

    CPU time is the scheduler's own count in nanoseconds: the first field of `/proc/PID/task/TID/schedstat` (Linux,
    Documentation/scheduler/sched-stats). A task that ends takes its count along, so the tree is read every
    quarter of a second while something is measured, and a task's last known count is kept.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[tuple[int, int], int] = {}
        self.peak_rss_bytes = 0

    def pids(self) -> set[int]:
        """The processes that run now."""
        return {self._root} | descendants(self._root)

    def cpu_ns(self) -> int:
        """CPU time of all tasks so far."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                self._read_tasks(pid)
        return sum(self._known.values())

    def _read_tasks(self, pid: int) -> None:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                counts = (task / "schedstat").read_bytes()
                self._known[pid, int(task.name)] = int(counts.split(b" ", 1)[0])

    def cpus(self) -> set[int]:
        """Where it may run."""
        try:
            return os.sched_getaffinity(self._root)
        except ProcessLookupError:
            return set()

    def rss_bytes(self) -> int:
        """Resident memory, summed; pages shared between processes count once for each."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_BYTES
        self.peak_rss_bytes = max(self.peak_rss_bytes, total)
        return total

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside the body the tree is read again and again, for what ends meanwhile and for the peak of memory."""
        self.peak_rss_bytes = self.rss_bytes()

        async def watch() -> None:
            while True:
                await asyncio.sleep(_SAMPLE_SECS)
                self.cpu_ns()
                self.rss_bytes()

        task = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
