"""Which processes listen on a TCP port, read from /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"  # the state's number in /proc/net/tcp


def listens(pids: Iterable[int], port: int) -> bool:
    """True when one of the processes listens on the port, at whatever address. Blocks for some milliseconds."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    return any(_open_files(pid) & inodes for pid in pids) if inodes else False


def _open_files(pid: int) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(os.readlink(entry.path))  # noqa: PTH115 - called for every open file
    return found


def _listening_inodes(port: int) -> set[str]:
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found
