"""CPU time and memory of a contender's whole process tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from tests.processes import descendants

_SAMPLE_SECS = 0.25
_PEAK = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)
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
        return total

    def forget_peak(self) -> None:
        """Resets the peak of memory to what is resident now (`man 5 proc`, clear_refs)."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def peak_rss_bytes(self) -> int:
        """The peaks of all processes that run now, summed."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found = _PEAK.search(Path(f"/proc/{pid}/status").read_bytes())
                total += int(found[1]) * 1024 if found else 0
        return total

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside the body the tree is read again and again, for what ends meanwhile."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(_SAMPLE_SECS)
                self.cpu_ns()

        task = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
