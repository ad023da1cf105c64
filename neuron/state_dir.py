"""Where a neuron keeps the directories of its engines and the memory of its simulated GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A Unix socket's path has at most 107 bytes, and vLLM puts sockets named by a UUID into TMPDIR, Python's
# multiprocessing a directory and a name of 31.
_MAX_TMP_PATH = 107 - 1 - 36


class StateDirError(Exception):
    """The state directory cannot be used; the message says which and why."""


@dataclass(frozen=True)
class EngineDir:
    """Of one engine. `tmp` is its TMPDIR and goes with its processes; the log stays until the model is loaded anew."""

    path: Path
    tmp: Path

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    def remove_tmp(self) -> None:
        shutil.rmtree(self.tmp, ignore_errors=True)

    def remove(self) -> None:
        self.remove_tmp()
        shutil.rmtree(self.path, ignore_errors=True)


class StateDir:
    """A directory of this user alone, held by one neuron at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vram = path / "vram"
        self._engines = path / "engines"

    @contextlib.contextmanager
    def held(self, *, remove_after: bool) -> Iterator[StateDir]:
        """Makes it, locks it and clears what a dead neuron left; afterwards removes it, or only the engines' part.

        Raises:
            StateDirError: another neuron holds it, or it is not this user's own.
        """
        try:
            lock = self._take()
        except OSError as error:
            raise StateDirError(f"state_dir {self.path}: {error.strerror or error}") from error
        try:
            self._clear()
            self._engines.mkdir(exist_ok=True)
            self.vram.mkdir(exist_ok=True)
            yield self
        finally:
            self._clear()
            if remove_after:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def new_engine(self, number: int) -> EngineDir:
        """A fresh directory for engine `number`."""
        path = self._engines / str(number)
        path.mkdir()
        tmp = path / "tmp"
        if len(os.fsencode(tmp)) > _MAX_TMP_PATH:
            tmp = self._short_tmp / str(number)
        tmp.mkdir(parents=True, mode=0o700)
        return EngineDir(path, tmp)

    @property
    def _short_tmp(self) -> Path:
        """For engines' temporary files where the path of the state directory is too long for sockets. Its name follows
        from that path, so that what a killed neuron left is found and cleared by the next."""
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        return Path(tempfile.gettempdir(), f"neuron-tmp-{os.getuid()}-{digest}")

    def _clear(self) -> None:
        shutil.rmtree(self._engines, ignore_errors=True)
        shutil.rmtree(self._short_tmp, ignore_errors=True)

    def _take(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        # Below a directory that everybody may write to, the name may have been taken by somebody else.
        status = self.path.lstat()
        if not self.path.is_dir() or self.path.is_symlink():
            raise StateDirError(f"state_dir {self.path} is not a directory")
        if status.st_uid != os.getuid():
            raise StateDirError(f"state_dir {self.path} belongs to user {status.st_uid}, not to {os.getuid()}")
        self.path.chmod(0o700)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StateDirError(f"state_dir {self.path} is in use by another neuron") from error
        return lock
