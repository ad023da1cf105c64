"""The directory of what outlives a neuron: a subdirectory for each engine, and the memory of simulated GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from neuron.engine import records
from neuron.engine.records import RunRecord
from neuron.harness.home import EngineHome

# A Unix socket's path has at most 107 bytes. Engines put sockets named by a UUID into TMPDIR; Python's multiprocessing
# needs 31 bytes for a directory and a name.
_MAX_TMP_PATH = 107 - 1 - 36


class StateDirError(Exception):
    """The state directory cannot be used; the message says why."""


@dataclass(frozen=True)
class EngineDir:
    """The directory of one engine. `tmp` is its TMPDIR; it is removed with the engine's processes, as `record` is. The
    log stays until the next load of the model."""

    path: Path
    tmp: Path

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    def remove_tmp(self) -> None:
        """Removes what only a running engine needs."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.record.unlink(missing_ok=True)

    def remove(self) -> None:
        self.remove_tmp()
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class FoundEngine:
    """An engine of an earlier neuron; `record` is None when it is missing or unreadable."""

    directory: EngineDir
    record: RunRecord | None


class StateDir:
    """A directory that belongs to this user and is locked by one neuron at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vram = path / "vram"
        self.home = EngineHome(path / "home")
        self._engines = path / "engines"
        self.keep = True
        """Keep the engines' files when this neuron ends: set until the engines of an earlier neuron are known, and when
        engines are left running."""

    @property
    def engine_id_prefix(self) -> str:
        """The prefix of the ids of all engines of this directory, whichever neuron started them. It is derived from the
        path, so it cannot be lost."""
        return f"{os.getuid()}-{self._digest}/"

    @contextlib.contextmanager
    def held(self, *, remove_after: bool) -> Iterator[StateDir]:
        """Creates and locks the directory; afterwards removes it, or only the engines' files. Files of an earlier
        neuron stay until `clear_except` removes them.

        Raises:
            StateDirError: another neuron uses it, or it does not belong to this user.
        """
        try:
            lock = self._lock()
            self._engines.mkdir(exist_ok=True)
            self.vram.mkdir(exist_ok=True)
            records.boot_id()
        except OSError as error:
            raise StateDirError(f"state_dir {self.path}: {error.strerror or error}") from error
        try:
            yield self
        finally:
            if not self.keep:
                self.clear_except(())
                if remove_after:
                    shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def found(self) -> list[FoundEngine]:
        """The engines of an earlier neuron, oldest first. Blocks."""
        numbers = sorted(int(entry.name) for entry in self._engines.iterdir() if entry.name.isdecimal())
        left = []
        for number in numbers:
            record = records.read(self._engines / str(number) / "run.json")
            tmp = self._tmp(number) if record is None else record.tmp_dir
            left.append(FoundEngine(EngineDir(self._engines / str(number), tmp), record))
        return left

    def clear_except(self, kept: Collection[EngineDir]) -> None:
        """Removes the files of all engines except those in `kept`. Blocks."""
        paths = {each.path for each in kept} | {each.tmp for each in kept}
        for parent in (self._engines, self._short_tmp):
            with contextlib.suppress(OSError):
                for entry in parent.iterdir():
                    if entry not in paths:
                        shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._short_tmp.rmdir()  # succeeds only when it is empty

    def new_engine(self, number: int) -> EngineDir:
        """Creates the directory of engine `number`. Raises OSError when the disk is full or not writable."""
        path, tmp = self._engines / str(number), self._tmp(number)
        path.mkdir()
        tmp.mkdir(parents=True, mode=0o700)
        return EngineDir(path, tmp)

    def _tmp(self, number: int) -> Path:
        tmp = self._engines / str(number) / "tmp"
        return self._short_tmp / str(number) if len(os.fsencode(tmp)) > _MAX_TMP_PATH else tmp

    @property
    def _short_tmp(self) -> Path:
        """The parent of the engines' TMPDIRs when the state directory's path is too long for sockets. Its name is
        derived from that path, so that the next neuron finds and clears the files of a killed one."""
        return Path(tempfile.gettempdir(), f"neuron-tmp-{os.getuid()}-{self._digest}")

    @property
    def _digest(self) -> str:
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]

    def _lock(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        # In a world-writable directory another user may have created it.
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
