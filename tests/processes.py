"""The processes of this host."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import psutil

Found = TypeVar("Found")

EXITED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class Process:
    """A live process (not a zombie)."""

    pid: int
    parent: int
    session: int
    command: str


def all_processes() -> list[Process]:
    """Every live process."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has exited
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() not in EXITED:
                    command = " ".join(process.cmdline())
                    found.append(Process(pid, process.ppid(), os.getsid(pid), command))
    return found


def engines_of(pid: int) -> dict[int, list[Process]]:
    """The engines of a neuron: each has its own session, led by a child of the neuron."""
    processes = all_processes()
    leaders = [process.pid for process in processes if process.parent == pid and process.session == process.pid]
    return {leader: [process for process in processes if process.session == leader] for leader in leaders}


def of_session(session: int) -> list[Process]:
    """The processes of a session, also those with a new parent."""
    return [process for process in all_processes() if process.session == session]


def descendants(pid: int) -> set[int]:
    """All live descendants of `pid`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return alive(child.pid for child in psutil.Process(pid).children(recursive=True))
    return set()


def alive(pids: Iterable[int]) -> set[int]:
    """The processes that still run."""
    return {pid for pid in pids if _is_alive(pid)}


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in EXITED
    return False


def eventually(look: Callable[[], Found], what: str, *, within_secs: float) -> Found:
    """Polls `look` until its result is true, and returns it.

    Raises:
        AssertionError: it is not true within `within_secs`.
    """
    deadline = time.monotonic() + within_secs
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_secs:g} s: {what}")
        time.sleep(0.05)
