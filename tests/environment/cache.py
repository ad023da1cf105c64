"""A cache outside the checkout for things that take long to build. Safe against concurrent builders."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_COMPLETE = ".complete"


class EnvironmentUnavailable(Exception):
    """Something the tests need cannot be built here; the message says what and why."""


class MachineUnsuitable(EnvironmentUnavailable):
    """This machine cannot run it, also when everything is installed: its tests are skipped even in CI."""


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/cortex-neuron`; created if missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cortex-neuron"
    root.mkdir(parents=True, exist_ok=True)
    return root


def key_of(*parts: str | bytes) -> str:
    """A short hash of the inputs of a build: different inputs, different name."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process on this machine at a time; the kernel frees the lock of a process that dies."""
    with (cache_root() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepared(name: str, build: Callable[[Path], None]) -> Path:
    """The directory `name` in the cache, built by `build` if it is missing or incomplete.

    It is built in place, since a virtual environment contains absolute paths. A marker file written last shows that
    the build was completed.

    Raises:
        EnvironmentUnavailable: raised by `build`; the partial directory is removed.
    """
    directory = cache_root() / name
    if (directory / _COMPLETE).exists():
        return directory
    with locked(name):
        if (directory / _COMPLETE).exists():
            return directory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        try:
            build(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        (directory / _COMPLETE).touch()
    return directory
