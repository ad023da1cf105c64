"""Whether what cortex keeps can be written: its state directory, and usage in the database.

The control owns it. What it finds is a warning in `/fleet`, in `/usage` and in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cortex.accounts.usage.journal_file import try_lock

LOOK_SECS: Final = 5.0
WRITTEN_BYTES: Final = 64 << 10
"""A few records of usage."""
_RUNNING: Final = "running"
"""A file of the state directory, locked by the cortex that runs there and deleted at its end."""

log = logging.getLogger(__name__)


class Storage:
    """Tries the state directory every LOOK_SECS, and is told by the recorder how the database does."""

    def __init__(self, directory: Path | None = None, *, opened_unwritable: bool = False) -> None:
        """None: nothing is kept, so nothing can be wrong. `opened_unwritable`: the database could not be made or
        written when cortex started, so the control does not write it any more."""
        self._directory = directory
        self._opened_unwritable = opened_unwritable and directory is not None
        self._of_directory = ""
        self._of_recorder = ""

    @property
    def warnings(self) -> list[str]:
        """What cannot be written now, and what to do."""
        problem = self._of_directory or self._of_recorder  # the recorder's follows from the directory's
        if not problem and self._opened_unwritable:
            problem = (
                f"{self._directory} could not be written when cortex started: restart cortex, or keys cannot be "
                "changed and limits are not saved"
            )
        return [problem] if problem else []

    @property
    def is_failing(self) -> bool:
        """Usage cannot be written now."""
        return bool(self._of_directory or self._of_recorder)

    def recorder_says(self, problem: str) -> None:
        """Why usage cannot be written to the database; empty if it can."""
        waits = f"usage cannot be written to the database, and waits in {self._directory}: {problem}"
        self._of_recorder = waits if problem else ""

    async def run(self) -> None:
        """Never returns."""
        while self._directory is not None:
            problem = await asyncio.to_thread(_problem_of, self._directory)
            if problem and not self._of_directory:
                log.error("%s", problem)
            elif self._of_directory and not problem:
                log.warning("%s can be written again", self._directory)
            self._of_directory = problem
            await asyncio.sleep(LOOK_SECS)
        await asyncio.Event().wait()


def try_writing(directory: Path, *, durable: bool) -> None:
    """Writes a file without a name, which is gone at once. `durable`: on the disk too. Blocks.

    Raises:
        OSError: the directory cannot be written, or its disk is full.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(WRITTEN_BYTES))
        file.flush()
        if durable:
            os.fsync(file.fileno())


def advice_for(error: OSError) -> str:
    """What to do about a state directory that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room there" if full else "give cortex's user the right to write, or set another state_dir"


def _problem_of(directory: Path) -> str:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try_writing(directory, durable=False)
    except OSError as error:
        return (
            f"{directory} cannot be written: {error.strerror}; usage is kept in memory only, and keys and limits in a "
            f"database there cannot be changed: {advice_for(error)}"
        )
    return ""


@contextlib.contextmanager
def marked_as_running(directory: Path | None) -> Iterator[None]:
    """Around all that writes there. Logs if the cortex before this one did not come to the end of it. Blocks."""
    lock = None if directory is None else _mark(directory / _RUNNING)
    try:
        yield
    finally:
        if lock is not None and directory is not None:
            with contextlib.suppress(OSError):
                (directory / _RUNNING).unlink()
            os.close(lock)


def _mark(path: Path) -> int | None:
    """The open and locked file; None if it cannot be made, or another cortex still runs there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_left = path.exists()
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    if not try_lock(lock):
        os.close(lock)
        return None
    if is_left:
        log.warning(
            "the last cortex with this state directory was killed or lost power: usage of its last second may be "
            "missing, and limits count what may have been used then"
        )
    return lock
