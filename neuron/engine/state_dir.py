"""Where a neuron keeps what outlives it: a directory for each engine, and the memory of its simulated GPUs."""

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

# A Unix socket's path has at most 107 bytes, and engines put sockets named by a UUID into TMPDIR, Python's
# multiprocessing a directory and a name of 31.
_MAX_TMP_PATH = 107 - 1 - 36


class StateDirError(Exception):
    """The state directory cannot be used; the message says which and why."""


@dataclass(frozen=True)
class EngineDir:
    """Of one engine. `tmp` is its TMPDIR and goes with its processes, as `record` does; the log stays until the model
    is loaded anew."""

    path: Path
    tmp: Path

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    def remove_tmp(self) -> None:
        """What only a running engine needs."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.record.unlink(missing_ok=True)

    def remove(self) -> None:
        self.remove_tmp()
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class FoundEngine:
    """What an earlier neuron left of an engine; `record` None: nothing that can be understood."""

    directory: EngineDir
    record: RunRecord | None


class StateDir:
    """A directory of this user alone, held by one neuron at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vram = path / "vram"
        self._engines = path / "engines"
        self.keep = True
        """What engines need stays at the end: those of an earlier neuron until it is known what is left of them, and
        those that are left running."""

    @property
    def engine_id_prefix(self) -> str:
        """What the ids of all engines of this directory begin with, whichever neuron started them. Follows from the
        path, so that it cannot be lost."""
        return f"{os.getuid()}-{self._digest}/"

    @contextlib.contextmanager
    def held(self, *, remove_after: bool) -> Iterator[StateDir]:
        """Makes and locks it; afterwards removes it, or only the engines' part. What an earlier neuron left stays until
        `found` and `clear_but` have dealt with it.

        Raises:
            StateDirError: another neuron holds it, or it is not this user's own.
        """
        try:
            lock = self._take()
            self._engines.mkdir(exist_ok=True)
            self.vram.mkdir(exist_ok=True)
            records.boot_id()
        except OSError as error:
            raise StateDirError(f"state_dir {self.path}: {error.strerror or error}") from error
        try:
            yield self
        finally:
            if not self.keep:
                self.clear_but(())
                if remove_after:
                    shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def found(self) -> list[FoundEngine]:
        """The engines that an earlier neuron left here, the oldest first. Blocks."""
        numbers = sorted(int(entry.name) for entry in self._engines.iterdir() if entry.name.isdecimal())
        left = []
        for number in numbers:
            record = records.read(self._engines / str(number) / "run.json")
            tmp = self._tmp(number) if record is None else record.tmp_dir
            left.append(FoundEngine(EngineDir(self._engines / str(number), tmp), record))
        return left

    def clear_but(self, kept: Collection[EngineDir]) -> None:
        """Removes what is left of engines, but for those in `kept`. Blocks."""
        paths = {each.path for each in kept} | {each.tmp for each in kept}
        for parent in (self._engines, self._short_tmp):
            with contextlib.suppress(OSError):
                for entry in parent.iterdir():
                    if entry not in paths:
                        shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._short_tmp.rmdir()  # only when it is empty

    def new_engine(self, number: int) -> EngineDir:
        """A fresh directory for engine `number`. Raises OSError where there is no room for one."""
        path, tmp = self._engines / str(number), self._tmp(number)
        path.mkdir()
        tmp.mkdir(parents=True, mode=0o700)
        return EngineDir(path, tmp)

    def _tmp(self, number: int) -> Path:
        tmp = self._engines / str(number) / "tmp"
        return self._short_tmp / str(number) if len(os.fsencode(tmp)) > _MAX_TMP_PATH else tmp

    @property
    def _short_tmp(self) -> Path:
        """For engines' temporary files where the path of the state directory is too long for sockets. Its name follows
        from that path, so that what a killed neuron left is found and cleared by the next."""
        return Path(tempfile.gettempdir(), f"neuron-tmp-{os.getuid()}-{self._digest}")

    @property
    def _digest(self) -> str:
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]

    def _take(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        # In a world-writable directory another user may have taken the name.
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
