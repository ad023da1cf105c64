"""Lock files in the caches of compilers and downloads whose owner is gone: the next build waits for them and never says
so.

torch's builds of extensions, and AMD's aiter, use a file that exists while a build runs (`lock`, `lock_*`): the builder
holds it open, and a killed one leaves it behind. Most others (inductor, flashinfer, the hub) lock a `*.lock` file with
flock(2), which ends with the process; where the file system has no flock, the file itself is the lock and has its
owner's pid.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

MAX_FILES = 50_000
"""Entries looked at in all directories together."""
MAX_NAMED = 3


def cache_directories(environ: Mapping[str, str], own: Mapping[str, str]) -> list[Path]:
    """Where an engine with this environment compiles and downloads to. `own`: the engine's own variables of such
    directories, with their names below the user's cache directory."""
    home = environ.get("HOME") or "/nonexistent"
    cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = environ.get("HF_HUB_CACHE") or f"{environ.get('HF_HOME') or f'{cache}/huggingface'}/hub"
    found = [
        environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions",
        environ.get("TORCHINDUCTOR_CACHE_DIR"),
        environ.get("TRITON_CACHE_DIR") or f"{environ.get('TRITON_HOME') or home}/.triton",
        *(environ.get(variable) or f"{cache}/{name}" for variable, name in own.items()),
        f"{environ.get('FLASHINFER_WORKSPACE_BASE') or home}/.cache/flashinfer",
        environ.get("AITER_JIT_DIR") or f"{home}/.aiter",
        f"{hub}/.locks",
    ]
    return [Path(each) for each in dict.fromkeys(found) if each]


def stale_locks(environ: Mapping[str, str], own: Mapping[str, str]) -> list[Path]:
    """Locks of builds that are gone, in the `cache_directories` of an engine, at most `MAX_NAMED`. Reads many
    directories, so it blocks for a while."""
    locks = list(_lock_files(cache_directories(environ, own)))
    if not locks:
        return []
    held = _held_files()
    free = [path for path in locks if (key := _identity(path)) is not None and key not in held]
    certain = [path for path in free if path.suffix != ".lock" or _owner_is_gone(path)]
    if certain or len(free) > MAX_NAMED:  # many: flock leaves its files behind after every build
        return certain[:MAX_NAMED]
    return free


def _lock_files(directories: list[Path]) -> Iterator[Path]:
    left = MAX_FILES
    for directory in directories:
        for parent, folders, names in os.walk(directory):
            left -= len(folders) + len(names)
            if left < 0:
                return
            yield from (
                Path(parent, name)
                for name in names
                if name == "lock" or name.startswith("lock_") or name.endswith(".lock")
            )


def _held_files() -> set[tuple[int, int]]:
    """Device and inode of every file that some process has open, as far as this user may see."""
    found: set[tuple[int, int]] = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    stat = entry.stat()
                    found.add((stat.st_dev, stat.st_ino))
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None


def _owner_is_gone(path: Path) -> bool:
    """True if the file names a process of this host that has ended."""
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8")[:1000].split()
        if lines and (len(lines) == 1 or lines[1] == socket.gethostname()):
            return not psutil.pid_exists(int(lines[0]))
    return False
