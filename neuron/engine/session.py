"""The processes of an engine.

An engine is started as the leader of a session of its own, and its helpers stay in it. The leader's pid is the
session's id, and the kernel does not reuse that number while the leader is unreaped or a member lives. A process
other than the leader's parent cannot keep it unreaped, so the number proves something only while the leader itself is
seen, known by its start time. Without a leader the proof is the engine's id, which all its processes inherit in their
environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from neuron.harness.base import ENGINE_ID_VARIABLE
from shared.process_stat import ProcessStat, stat_of


@dataclass(frozen=True)
class Leader:
    """An engine's main process, by what no other process can have: its pid, when it began, and the engine's id."""

    pid: int
    start_ticks: int
    engine_id: str

    @property
    def alive(self) -> bool:
        """True while this very process runs; False for a zombie, and for a stranger with its number."""
        found = stat_of(self.pid)
        return found is not None and found.alive and found.start_ticks == self.start_ticks


def processes() -> Iterator[ProcessStat]:
    """Every process of this host, zombies included. Skips one that ends meanwhile. Blocks for some milliseconds."""
    for pid in psutil.pids():
        found = stat_of(pid)
        if found is not None:
            yield found


def engine_id_of(pid: int) -> str | None:
    """The id of the engine that a process belongs to; None when it belongs to none, or may not be read."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ().get(ENGINE_ID_VARIABLE)
    return None


def members(leader: Leader) -> list[ProcessStat]:
    """The engine's processes, zombies too: those of the leader's session and group while the leader is there, and
    wherever they are those that carry the engine's id."""
    table = list(processes())
    present = any(each.pid == leader.pid and each.start_ticks == leader.start_ticks for each in table)
    return [
        each
        for each in table
        # Older than its leader: not a member, so its environment is not read.
        if each.start_ticks >= leader.start_ticks
        and ((present and leader.pid in (each.session, each.group)) or engine_id_of(each.pid) == leader.engine_id)
    ]


def live_members(leader: Leader) -> set[int]:
    """The pids of the members that are no zombies."""
    return {each.pid for each in members(leader) if each.alive}


def members_by_session() -> dict[int, set[int]]:
    """The pids of the live processes of every session, in one pass."""
    found: dict[int, set[int]] = {}
    for process in processes():
        if process.alive:
            found.setdefault(process.session, set()).add(process.pid)
    return found


def marked(prefix: str) -> dict[int, str]:
    """Live processes of the engines whose id begins with `prefix`: pid -> engine id. Blocks as `processes` does."""
    found: dict[int, str] = {}
    for process in processes():
        engine_id = engine_id_of(process.pid) if process.alive else None
        if engine_id is not None and engine_id.startswith(prefix):
            found[process.pid] = engine_id
    return found


def kill_members(leader: Leader) -> set[int]:
    """SIGKILL to every live member; the pids that were alive. Call until it finds none: members may fork meanwhile."""
    alive = live_members(leader)
    for pid in alive:
        kill(pid)
    return alive


def kill(pid: int) -> None:
    """SIGKILL, to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def reap_orphans(leader: Leader) -> None:
    """Takes the exit status of zombies that became our children (we are PID 1 of a container, or a subreaper)."""
    for process in members(leader):
        if not process.alive and process.parent == os.getpid() and process.pid != leader.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
