"""Processes on this machine, from /proc."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


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
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has exited
        state, parent, _, session = stat.rpartition(")")[2].split()[:4]
        if state not in ("Z", "X"):
            found.append(Process(int(directory.name), int(parent), int(session), command))
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
    """All descendants of `pid`."""
    parents = {process.pid: process.parent for process in all_processes()}
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """The processes that still run."""
    return set(pids) & {process.pid for process in all_processes()}


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
