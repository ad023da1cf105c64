"""Asks the installation of an engine for its version: package metadata beside the executable, else `--version`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Final, TypeAlias

from neuron.config import HarnessSettings
from neuron.harness.base import Harness, InstalledEngine
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

WAIT_SECS: Final = 1.0
"""How long a load waits for `--version`; a slower answer is used by later loads."""

_GIVE_UP_SECS: Final = 60.0
RETRY_SECS: Final = 60.0
"""After a failure, which may have been the host's: no file descriptors, a file system that hangs."""

_UNKNOWN: Final = InstalledEngine()
_PRINTED = re.compile(
    r"\bversion:?\s+(?:is\s+)?v?(\d[\w.+-]*)|^(?:\S+\s+)?v?(\d+(?:\.\d+)+[\w.+-]*)\s*$", re.IGNORECASE | re.MULTILINE
)
_WORD = re.compile(r"[a-z][a-z0-9_]+")

_Key: TypeAlias = tuple[str, int, str]
"""An executable, when it was changed, and the command with what is asked of it."""


class InstalledEngines:
    """Asks each installation once, again when its executable has changed, or at a load RETRY_SECS after a failure."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._known: dict[_Key, InstalledEngine] = {}
        self._failed_at: dict[_Key, float] = {}
        self._asking: dict[_Key, asyncio.Task[None]] = {}
        self._clock = clock
        self._tasks = TaskSet()

    async def of(self, harness: Harness, settings: HarnessSettings, environ: Mapping[str, str]) -> InstalledEngine:
        """What is known of the engine that `settings` start, after at most `WAIT_SECS`. `environ`: what it inherits."""
        program = harness.program(settings)
        if not program or (harness.python_package is None and not harness.version_arguments):
            return _UNKNOWN
        env = {**environ, **settings.env}
        executable = await asyncio.to_thread(_executable, program[0], env.get("PATH"))
        if executable is None:
            return _UNKNOWN
        key = (*executable, " ".join((*program, *harness.version_arguments, harness.version_pattern or "")))
        if key in self._known:
            return self._known[key]
        if self._clock() - self._failed_at.get(key, -inf) < RETRY_SECS:
            return _UNKNOWN
        if harness.python_package is not None:
            found = await asyncio.to_thread(
                _installed, Path(executable[0]), harness.python_package, harness.option_files
            )
            if found is not None:
                self._known[key] = found
                log.info("%s is version %s", executable[0], found.version)
                return found
        if harness.version_arguments:
            asking = self._asking.get(key)
            if asking is None:
                argv = (*program, *harness.version_arguments)
                work = self._ask(key, argv, env, harness.version_pattern)
                asking = self._tasks.spawn(work, name=f"version of {program[0]}")
                self._asking[key] = asking
            await asyncio.wait({asking}, timeout=WAIT_SECS)
        return self._known.get(key, _UNKNOWN)

    async def close(self) -> None:
        await self._tasks.close()

    async def _ask(self, key: _Key, argv: Sequence[str], env: Mapping[str, str], pattern: str | None) -> None:
        failure: object = None
        try:
            printed, code = await _output(argv, env)
            version = _version_in(printed, pattern)
            if version is not None or code == 0:
                self._known[key] = InstalledEngine(version)
                log.info("%s is version %s", key[0], version)
            else:
                failure = f"it ended with status {code}"
        except asyncio.TimeoutError:
            failure = f"no answer within {_GIVE_UP_SECS:.0f} s"
        except OSError as error:
            failure = error
        if failure is not None:
            log.info("%s does not tell its version: %s", key[0], failure)
            self._failed_at[key] = self._clock()
        del self._asking[key]


def _version_in(printed: str, pattern: str | None) -> str | None:
    found = None if pattern is None else re.search(pattern, printed)
    found = found or _PRINTED.search(printed)
    return None if found is None else found[found.lastindex or 0]


async def _output(argv: Sequence[str], env: Mapping[str, str]) -> tuple[str, int | None]:
    """What the command prints, and its exit status. Raises OSError and TimeoutError; no process of it is left."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(env),
        start_new_session=True,
    )
    try:
        async with timeout(_GIVE_UP_SECS):
            output, _ = await process.communicate()
            return output.decode(errors="replace"), process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _executable(name: str, path: str | None) -> tuple[str, int] | None:
    """Its path and modification time in nanoseconds; None if there is none. Blocks."""
    found = shutil.which(name, path=path)
    try:
        return None if found is None else (found, Path(found).stat().st_mtime_ns)
    except OSError:
        return None


def _installed(executable: Path, package: str, option_files: Sequence[str]) -> InstalledEngine | None:
    """The package in the Python environment of `executable`; None if it is in none. Blocks."""
    wanted = _normal(package)
    for directory in _package_directories(executable):
        with contextlib.suppress(OSError):
            for entry in directory.glob("*-*.dist-info"):
                name, _, version = entry.name.removesuffix(".dist-info").partition("-")
                if _normal(name) == wanted:
                    return InstalledEngine(version, tuple(_words(directory, option_files)))
    return None


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _package_directories(executable: Path) -> Iterator[Path]:
    """Where the Python of `executable` keeps packages: the environment that contains it, as named or through links,
    or that of the interpreter in its first line."""
    programs = [executable, executable.resolve()]
    with contextlib.suppress(OSError), executable.open("rb") as file:
        first = file.readline(512)
        if first.startswith(b"#!"):
            programs.insert(0, Path(os.fsdecode(first[2:].strip().split(b" ")[0])))
    for prefix in dict.fromkeys(program.parent.parent for program in programs):
        for pattern in ("lib*/python3*/site-packages", "lib*/python3*/dist-packages"):
            yield from sorted(prefix.glob(pattern), reverse=True)


def _words(directory: Path, option_files: Sequence[str]) -> Iterator[frozenset[str]]:
    for name in option_files:
        with contextlib.suppress(OSError):
            yield frozenset(_WORD.findall((directory / name).read_text(encoding="utf-8", errors="replace")))
