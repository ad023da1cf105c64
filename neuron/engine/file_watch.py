"""Tells when a file is written, with inotify(7)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_IN_MODIFY = 0x2
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # IN_NONBLOCK and IN_CLOEXEC have the same values
_MAX_EVENTS = 4096  # bytes


class FileWatch:
    """Calls `on_write` after each write to the file, from its creation until `close`. Needs a running loop.

    Without inotify (the user's limit is reached, the file is missing) it never calls, so callers look now and then
    themselves.
    """

    def __init__(self, path: Path, on_write: Callable[[], None]) -> None:
        self._on_write = on_write
        self._fd: int | None = None
        try:
            self._fd = _watch(path)
        except OSError as error:
            log.debug("%s is not watched: %s", path, error)
        else:
            asyncio.get_running_loop().add_reader(self._fd, self._readable, self._fd)

    def close(self) -> None:
        """May be called again."""
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _readable(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(fd, _MAX_EVENTS)) > _MAX_EVENTS // 2:
                pass
        self._on_write()


def _watch(path: Path) -> int:
    """An inotify descriptor for one file. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = int(libc.inotify_init1(_FLAGS))
        if fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) >= 0:
            return fd
    except AttributeError as error:
        raise OSError("the C library has no inotify") from error
    number = ctypes.get_errno()
    if fd >= 0:
        os.close(fd)
    raise OSError(number, os.strerror(number))
