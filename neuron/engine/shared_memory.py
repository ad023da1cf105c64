"""Shared memory that engines leave in /dev/shm when they are killed.

Names there are random, and other programs use the same ones: what belongs to an engine is what its processes have
mapped while they live, and no other process has once they are gone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from neuron.engine import session

log = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - where POSIX shared memory is, not where we write


@dataclass(frozen=True)
class SharedFile:
    """A file below /dev/shm; the inode tells it from a later one of the same name."""

    path: str
    inode: int


def mapped_by(pids: Iterable[int]) -> frozenset[SharedFile]:
    """What the processes have mapped of /dev/shm and is still linked there. Blocks for some milliseconds.

    Not through psutil: it gives no inode and hides that a file is deleted, and it reads /proc/PID/smaps, for which the
    kernel walks all pages of the process.
    """
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                # address perms offset dev inode path
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(_SHARED_MEMORY) and not fields[5].endswith(" (deleted)"):
                    found.add(SharedFile(fields[5], int(fields[4])))
    return frozenset(found)


def recorded(files: Iterable[tuple[str, int]]) -> frozenset[SharedFile]:
    """From a run record; whatever else it may name is left out."""
    return frozenset(SharedFile(path, inode) for path, inode in files if Path(path).parent == Path(_SHARED_MEMORY))


def remove(files: Collection[SharedFile]) -> None:
    """Unlinks those that no process has mapped. Blocks for some milliseconds."""
    left = {file for file in files if _inode(file.path) == file.inode}
    if not left:
        return
    in_use = mapped_by(process.pid for process in session.processes())
    for file in left - in_use:
        log.info("removing %s, which an engine left behind", file.path)
        with contextlib.suppress(OSError):
            Path(file.path).unlink()


def _inode(path: str) -> int | None:
    with contextlib.suppress(OSError):
        return Path(path).stat().st_ino
    return None
