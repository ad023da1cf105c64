"""Looking at real processes from tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path


def parents() -> dict[int, int]:
    """pid -> parent pid of every process that is not a zombie."""
    table: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in ("Z", "X"):
            table[int(path.parent.name)] = int(fields[1])
    return table


def descendants(pid: int) -> set[int]:
    """All processes below `pid`, without it."""
    table = parents()
    found: set[int] = set()
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in table.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """Those of the processes that still run."""
    return set(pids) & set(parents())


def wait_for(condition: Callable[[], bool], *, timeout_secs: float = 20, what: str = "the condition") -> None:
    """Looks every 20 ms until the condition holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + timeout_secs
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_secs:g} s"
        time.sleep(0.02)
