"""One process as the kernel describes it, in one read of /proc/PID/stat.

psutil would not do. A pid and a start time in clock ticks identify a process until the host reboots, but psutil gives
the start time only as a float that moves with the host's clock. psutil also reports neither session nor process group,
and it reads each value separately: between two reads the process may end and another process get its pid.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """`state` is the kernel's letter, `session` and `group` are the pids of the leaders, `start_ticks` is the start
    time in clock ticks since boot, `cpu_ticks` the CPU time that it has used."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_ticks: int
    cpu_ticks: int

    @property
    def alive(self) -> bool:
        """False for a zombie: it holds nothing but its pid."""
        return self.state not in ("Z", "X")


def stat_of(pid: int) -> ProcessStat | None:
    """None when there is no such process. A zombie is one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    return None


def parse_stat(text: str) -> ProcessStat:
    """Parses a line of proc_pid_stat(5). The name in parentheses may contain anything, parentheses included."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    pid = int(head.split(" ", 1)[0])
    return ProcessStat(
        pid=pid,
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
    )
