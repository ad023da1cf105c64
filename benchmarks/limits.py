"""Kernel limits for the contenders and the load generator: open files and CPU priority."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

WANTED_OPEN_FILES = 65536
_NICE = -15


def raise_open_files() -> int:
    """As many open files as may be had, at most WANTED_OPEN_FILES (root may have them all); the number that it became.

    What cannot be accepted for want of a file is closed by libuv without a word: to a client it looks like an engine
    that hangs up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < WANTED_OPEN_FILES:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, WANTED_OPEN_FILES))
            hard = WANTED_OPEN_FILES
    best = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= best:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
    return best


def prefer(pid: int) -> int:
    """Lets a process and what it will start run before others, so that whatever else this machine does disturbs less;
    its nice value then. Only root may.

    Where the kernel groups processes by session (sched_autogroup), it is the group's value that counts.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICE), encoding="ascii")
    return os.getpriority(os.PRIO_PROCESS, pid)
