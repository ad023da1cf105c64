"""Removes shared memory that killed engines leave in /dev/shm.

Names there are random and not specific to engines. A file belongs to an engine if the engine's processes had it mapped
and no other process has it mapped once they are gone.
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
    """A file in /dev/shm; the inode distinguishes it from a later file of the same name."""

    path: str
    inode: int


def mapped_by(pids: Iterable[int]) -> frozenset[SharedFile]:
    """What the processes have mapped of /dev/shm and is still linked there. Blocks for some milliseconds.

    Not through psutil: it returns no inodes, hides that a file is deleted, and reads /proc/PID/smaps, for which the
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
    """The files in a run record, without paths outside /dev/shm."""
    return frozenset(SharedFile(path, inode) for path, inode in files if Path(path).parent == Path(_SHARED_MEMORY))


def remove(files: Collection[SharedFile]) -> None:
    """Unlinks the files that no process has mapped. Blocks for some milliseconds."""
    existing = {file for file in files if _inode(file.path) == file.inode}
    if not existing:
        return
    in_use = mapped_by(process.pid for process in session.processes())
    for file in existing - in_use:
        log.info("removing %s, left by an engine", file.path)
        with contextlib.suppress(OSError):
            Path(file.path).unlink()


def _inode(path: str) -> int | None:
    with contextlib.suppress(OSError):
        return Path(path).stat().st_ino
    return None
