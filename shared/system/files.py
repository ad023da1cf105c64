"""Atomic file replacement, for state that must survive a crash, changes of files, and whether a directory can be
written."""

from __future__ import annotations

import os
from pathlib import Path

Stamp = tuple[int, ...]
"""Identifies a version of a file: device, inode, size, modification time, mode and owners; empty for a missing file.
With another mode or owner it may be readable that was not."""


def stamp_of(path: Path) -> Stamp:
    """The current stamp of a file, following symbolic links. Blocks."""
    try:
        status = path.stat()
    except OSError:
        return ()
    version = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return *version, status.st_mode, status.st_uid, status.st_gid


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces `path` with `data`: a reader sees the old content or the new one, never a part. Blocks.

    The file is readable by its owner only. `durable`: on disk, also after a power cut, when this returns. One writer
    at a time: the new content is written to `<path>.new` first.

    Raises:
        OSError: the disk is full, or the directory is not writable. The old content is still there.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123 - by descriptor
            os.fchmod(fd, 0o600)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        fresh.replace(path)
        if durable:
            _sync_directory(path.parent)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """The new name is an entry of the directory, which is flushed by itself."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_writable(path: Path) -> bool:
    """True for a directory that this user can write to, or could create. Blocks."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False
