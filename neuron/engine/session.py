"""The processes of an engine.

An engine's main process leads its own session, and its helpers stay in it. The leader's pid is the session's id, which
the kernel does not reuse while the leader is unreaped or a member lives. Only the leader's parent can keep it unreaped,
so for an adopted engine the session's id is reliable only while the leader exists with the recorded start time. Without
the leader, members are recognised by the engine's id, which they inherit in their environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from neuron.harness.base import ENGINE_ID_VARIABLE
from neuron.progress.stall import ProcessWork
from shared.system.process_stat import ProcessStat, stat_of

log = logging.getLogger(__name__)

_KILL_SECS = 10.0
_KILL_POLL_SECS = 0.05

_TICKS_PER_SEC = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Leader:
    """An engine's main process, identified by pid and start time, and the engine's id."""

    pid: int
    start_ticks: int
    engine_id: str

    @property
    def alive(self) -> bool:
        """True while this process runs; False for a zombie, and for another process that reuses its pid."""
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
    """The engine's processes, zombies included: those with the engine's id, and, while the leader exists, those of its
    session and process group."""
    table = list(processes())
    leader_exists = any(each.pid == leader.pid and each.start_ticks == leader.start_ticks for each in table)
    return [
        each
        for each in table
        # Skip reading the environment of older processes: they cannot be members.
        if each.start_ticks >= leader.start_ticks
        and ((leader_exists and leader.pid in (each.session, each.group)) or engine_id_of(each.pid) == leader.engine_id)
    ]


def live_members(leader: Leader) -> set[int]:
    """The pids of the members, without zombies."""
    return {each.pid for each in members(leader) if each.alive}


def work_of(leader: Leader) -> dict[int, ProcessWork]:
    """What each of the engine's processes has done since its start, by pid. Blocks as `processes` does."""
    return {
        each.pid: ProcessWork(each.cpu_ticks / _TICKS_PER_SEC, _io_bytes(each.pid))
        for each in members(leader)
        if each.alive
    }


def _io_bytes(pid: int) -> int | None:
    """What a process has read and written, by system calls and from disk; None if the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(": ", 1) for line in lines)
    return sum(int(values[key]) for key in ("rchar", "wchar", "read_bytes", "write_bytes"))


def members_by_session() -> dict[int, set[int]]:
    """The pids of the live processes of every session, from one pass over all processes."""
    found: dict[int, set[int]] = {}
    for process in processes():
        if process.alive:
            found.setdefault(process.session, set()).add(process.pid)
    return found


def engine_processes(prefix: str) -> dict[int, str]:
    """Live processes of engines whose id starts with `prefix`: pid -> engine id. Blocks as `processes` does."""
    found: dict[int, str] = {}
    for process in processes():
        engine_id = engine_id_of(process.pid) if process.alive else None
        if engine_id is not None and engine_id.startswith(prefix):
            found[process.pid] = engine_id
    return found


def kill_members(leader: Leader) -> set[int]:
    """Sends SIGKILL to every live member and returns their pids. Repeat until it returns none: members may fork
    meanwhile."""
    alive = live_members(leader)
    for pid in alive:
        kill(pid)
    return alive


def kill(pid: int) -> None:
    """Sends SIGKILL to a process that may have exited already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def kill_strays(prefix: str, spared: Collection[str]) -> None:
    """Kills every process that carries an engine id with this prefix, except those in `spared`, and waits until they
    are gone."""

    def strays() -> list[int]:
        return [pid for pid, engine_id in engine_processes(prefix).items() if engine_id not in spared]

    deadline = time.monotonic() + _KILL_SECS
    while found := await asyncio.to_thread(strays):
        if time.monotonic() >= deadline:
            log.error("processes %s of ended engines survive SIGKILL", sorted(found))
            return
        log.warning("killing processes %s: their engines have ended", sorted(found))
        for pid in found:
            kill(pid)
        await asyncio.sleep(_KILL_POLL_SECS)


def reap_orphans(leader: Leader) -> None:
    """Reaps members that became our children (neuron is PID 1 of a container, or a subreaper) and exited."""
    for process in members(leader):
        if not process.alive and process.parent == os.getpid() and process.pid != leader.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
