"""Limits of this process that its children inherit."""

from __future__ import annotations

import resource

WANTED_OPEN_FILES = 65536


def raise_open_files() -> int:
    """As many open files as may be had, at most WANTED_OPEN_FILES; the number that it became."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    best = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= best:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
    return best
