"""One spare process, as neuron sees it: started, asked to become an engine, or ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from neuron.engine.process import EngineProcess
from neuron.engine.state_dir import EngineDir
from neuron.harness.base import ENGINE_ID_VARIABLE, EarlyImports, EngineCommand
from neuron.lifecycle.spare import spare_process
from neuron.lifecycle.spare.program import NotPython, Program, program_of
from shared.protocol import Device
from shared.tasks import timeout

IMPORT_SECS = 300.0
"""Imports at idle priority take long on a busy host."""
TAKE_SECS = 1.0
_TITLE_BYTES = 8192  # of the command line in /proc after it became an engine
_MIB = 2**20


class SpareFailed(Exception):
    """A spare cannot be made, or did not become an engine; the message says why."""


class SpareRefused(SpareFailed):
    """The spare works, but what it has imported does not fit any longer."""


class SpareState(Enum):
    """Of a spare process: `importing`, or `ready` to become an engine."""

    IMPORTING = "importing"
    READY = "ready"


@dataclass(frozen=True)
class SpareOrigin:
    """What a spare is made for: the command of a load that succeeded, its devices, and what its harness imports."""

    command: EngineCommand
    devices: tuple[Device, ...]
    imports: EarlyImports

    def mismatch(self, command: EngineCommand, devices: tuple[Device, ...]) -> str | None:
        """Why a spare of this origin cannot become the engine of `command` on `devices`; None when it can. Pure."""
        changed = _different(self.command.env, command.env) - self.imports.late_variables - _PER_ENGINE
        if changed:
            return f"{', '.join(sorted(changed))} changed, and imports may read it"
        if _kinds(self.devices) != _kinds(devices):
            return "its devices are of another kind, and imports may ask for that"
        return None


_PER_ENGINE = frozenset({"TMPDIR", ENGINE_ID_VARIABLE})


class Spare:
    """A process that has the id, directory and log of the engine that it may become, so that everything that recognises
    an engine's processes recognises its own, also after it was forked.

    Ends with `close`, unless `become` succeeded: then `process` is the engine's.
    """

    def __init__(
        self,
        origin: SpareOrigin,
        number: int,
        engine_id: str,
        directory: EngineDir,
        *,
        program: Program,
        env: Mapping[str, str],
        process: EngineProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.origin = origin
        self.number = number
        self.engine_id = engine_id
        self.directory = directory
        self.process = process
        self.state = SpareState.IMPORTING
        self._program = program
        self._env = env
        self._reader = reader
        self._writer = writer
        self._is_engine = False

    @classmethod
    async def start(cls, origin: SpareOrigin, number: int, engine_id: str, directory: EngineDir) -> Spare:
        """Starts the process, which imports from then on.

        Raises:
            NotPython: no spare is possible. SpareFailed: its interpreter cannot be started.
        """
        kept = {name: value for name, value in origin.command.env.items() if name not in origin.imports.late_variables}
        env = {**kept, "TMPDIR": str(directory.tmp), ENGINE_ID_VARIABLE: engine_id}
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(ours.close)
            with theirs:
                try:
                    program = await asyncio.to_thread(program_of, origin.command.argv, env)
                    script = str(Path(spare_process.__file__))
                    argv = [*program.interpreter, script, str(theirs.fileno()), " " * _TITLE_BYTES]
                    process = await EngineProcess.start(argv, env, directory.log, inherited=[theirs.fileno()])
                except (OSError, ValueError) as error:
                    raise SpareFailed(f"cannot start {origin.command.argv[0]}: {error}") from error
            ours.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=ours)
            cleanup.pop_all()
        return cls(
            origin,
            number,
            engine_id,
            directory,
            program=program,
            env=env,
            process=process,
            reader=reader,
            writer=writer,
        )

    async def until_ready(self) -> None:
        """Returns when everything is imported.

        Raises:
            SpareFailed: an import failed, or took longer than IMPORT_SECS.
        """
        setup = {
            "program": self._program.path,
            "module": self._program.module,
            "imports": list(self.origin.imports.modules),
            "spawns": self.origin.imports.spawns,
            "late": sorted(self.origin.imports.late_variables),
            "children": {name: sorted(also) for name, also in self.origin.imports.child_variables.items()},
        }
        answer = await self._ask(setup, IMPORT_SECS)
        if not answer.get("ready"):
            raise SpareFailed(str(answer.get("failed", "unexpected answer")))
        self.state = SpareState.READY

    async def become(self, command: EngineCommand) -> None:
        """Turns the process into the engine of `command`, for which there is no `mismatch`.

        Raises:
            SpareRefused: the program or a file that it has imported changed. SpareFailed: it ended, or did not answer
            within TAKE_SECS. Close it in both cases.
        """
        wanted = command.env
        try:
            program = await asyncio.to_thread(program_of, command.argv, wanted)
        except NotPython as error:
            raise SpareRefused(str(error)) from error
        if replace(program, arguments=()) != replace(self._program, arguments=()):
            raise SpareRefused(f"{command.argv[0]} is another program now")
        change = _different(self._env, wanted)
        order = {
            "arguments": list(program.arguments),
            "title": _title(program),
            "name": program.name,
            "set": {name: wanted[name] for name in change if name in wanted},
            "unset": sorted(name for name in change if name not in wanted),
        }
        answer = await self._ask(order, TAKE_SECS)
        if not answer.get("taken"):
            raise SpareRefused(str(answer.get("refused", "unexpected answer")))
        self._is_engine = True
        self._writer.close()

    def memory_mb(self) -> int:
        """MiB of host memory that the process takes; 0 when it is gone. Blocks for a moment."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss) // _MIB
        except psutil.Error:
            return 0

    async def close(self) -> None:
        """Kills the process, and returns when it is gone. Its directory stays. Does nothing once it is an engine."""
        if not self._is_engine:
            self._writer.close()
            _ = await self.process.kill()

    async def _ask(self, message: dict[str, Any], secs: float) -> dict[str, Any]:
        try:
            async with timeout(secs):
                self._writer.write(json.dumps(message).encode() + b"\n")
                line = await self._reader.readline()
            if not line:
                raise SpareFailed("it ended")
            answer = json.loads(line)
        except asyncio.TimeoutError as error:
            raise SpareFailed(f"no answer within {secs:g} s") from error
        except (OSError, ValueError) as error:
            raise SpareFailed(f"its connection failed: {error}") from error
        return answer if isinstance(answer, dict) else {}


def _title(program: Program) -> list[str]:
    """The command line that the kernel would show after a plain start."""
    what = [program.path] if program.module is None else ["-m", program.module]
    return [*program.interpreter, *what, *program.arguments]


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """The names that only one of the environments has, or that have different values."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def _kinds(devices: tuple[Device, ...]) -> set[tuple[str, str | None]]:
    return {(device.name, device.compute_capability) for device in devices}
