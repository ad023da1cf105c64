"""Asks the installation of an engine for its version: package metadata beside the executable, else `--version`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from neuron.config import HarnessSettings
from neuron.harness.base import Harness, InstalledEngine
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

WAIT_SECS: Final = 1.0
"""How long a load waits for `--version`; a slower answer is used by later loads."""

_GIVE_UP_SECS: Final = 60.0
_UNKNOWN: Final = InstalledEngine()
_PRINTED = re.compile(
    r"\bversion:?\s+(?:is\s+)?v?(\d[\w.+-]*)|^(?:\S+\s+)?v?(\d+(?:\.\d+)+[\w.+-]*)\s*$", re.IGNORECASE | re.MULTILINE
)
_WORD = re.compile(r"[a-z][a-z0-9_]+")


class InstalledEngines:
    """Asks each installation once, again when its executable has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, str], InstalledEngine] = {}
        self._asking: dict[tuple[str, int, str], asyncio.Task[None]] = {}
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
        key = (*executable, " ".join(program))
        if key in self._known:
            return self._known[key]
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
                asking = self._tasks.spawn(self._ask(key, argv, env), name=f"version of {program[0]}")
                self._asking[key] = asking
            await asyncio.wait({asking}, timeout=WAIT_SECS)
        return self._known.get(key, _UNKNOWN)

    async def close(self) -> None:
        await self._tasks.close()

    async def _ask(self, key: tuple[str, int, str], argv: Sequence[str], env: Mapping[str, str]) -> None:
        found = _UNKNOWN
        try:
            printed = _PRINTED.search(await _output(argv, env))
        except asyncio.TimeoutError:
            log.info("%s does not tell its version within %.0f s", key[0], _GIVE_UP_SECS)
        except OSError as error:
            log.info("%s does not tell its version: %s", key[0], error)
        else:
            found = _UNKNOWN if printed is None else InstalledEngine(printed[1] or printed[2])
            log.info("%s is version %s", key[0], found.version)
        self._known[key] = found
        del self._asking[key]


async def _output(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """What the command prints. Raises OSError and TimeoutError; no process of it is left."""
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
            return output.decode(errors="replace")
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
