"""The processes of a session, read from /proc.

An engine is started as the leader of a session of its own, and its helpers stay in it. The leader's pid is the
session's id, and the kernel gives that number to nobody else while the leader is unreaped or a member lives: as long
as the caller has not reaped the leader, nothing here can hit a stranger.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """One line of /proc/PID/stat; `session` and `group` are pids of leaders."""

    pid: int
    state: str
    parent: int
    group: int
    session: int

    @property
    def alive(self) -> bool:
        """False for a zombie: it holds nothing any more but its number."""
        return self.state not in ("Z", "X")


def parse_stat(text: str) -> ProcessStat:
    """A /proc/PID/stat line. The name in parentheses may hold anything, further parentheses included."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return ProcessStat(int(head.split(" ", 1)[0]), fields[0], int(fields[1]), int(fields[2]), int(fields[3]))


def processes() -> Iterator[ProcessStat]:
    """Every process there is, zombies too. One that ends meanwhile is passed over. Blocks for some milliseconds."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                yield parse_stat(Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace"))


def members(session: int) -> list[ProcessStat]:
    """The session's processes and those of its leader's process group, zombies too."""
    return [process for process in processes() if session in (process.session, process.group)]


def members_by_session() -> dict[int, set[int]]:
    """The pids of the live processes of every session, in one pass."""
    found: dict[int, set[int]] = {}
    for process in processes():
        if process.alive:
            found.setdefault(process.session, set()).add(process.pid)
    return found


def kill_members(session: int) -> set[int]:
    """SIGKILL to every live member; the pids that were alive. Call until it finds none: members may fork meanwhile."""
    alive = {process.pid for process in members(session) if process.alive}
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


def reap_orphans(session: int) -> None:
    """Takes the exit status of zombies that became our children (we are PID 1 of a container, or a subreaper)."""
    for process in members(session):
        if not process.alive and process.parent == os.getpid() and process.pid != session:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
