"""Starts a contender on its CPUs, waits until it serves, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders.contender import Contender, ContenderUnavailable, Launch, Place
from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.limits import prefer
from benchmarks.load.drive import repeat
from benchmarks.load.pool import Pool
from benchmarks.load.request import chat_request
from benchmarks.measure.tree import ProcessTree
from tests.processes import alive, descendants

REPOSITORY = Path(__file__).parents[2]
_STOP_SECS = 5.0


def free_port() -> int:
    """A free port below the kernel's range for outgoing connections: one of thousands of connections could take a port
    in that range."""
    for port in range(20000 + os.getpid() % 8000, 32000):
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise ContenderUnavailable("no free port")


_given: set[int] = set()


@contextlib.contextmanager
def on_cpus(cpus: set[int]) -> Iterator[None]:
    """Processes started inside the body run on these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(command: list[str], log: Path, *, cpus: set[int], launch: Launch | None = None) -> subprocess.Popen[bytes]:
    """Starts a process in its own session, with its output in `log`."""
    env = {**os.environ, **(launch.env if launch else {})}
    with log.open("ab") as output, on_cpus(cpus):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd=(launch.cwd if launch else None) or REPOSITORY,
            start_new_session=True,
        )
    prefer(process.pid)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminates a process and kills its descendants that do not exit."""
    below = descendants(process.pid)
    process.terminate()
    try:
        process.wait(_STOP_SECS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in alive(below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Running:
    """A contender that serves."""

    contender: Contender
    port: int
    tree: ProcessTree
    version: str


class Runner:
    """The processes of one contender. A measurement that needs a fresh process starts it again."""

    def __init__(self, contender: Contender, engine_port: int, directory: Path, cpus: set[int], load_cpus: set[int]):
        self.contender = contender
        self._engine_port = engine_port
        self._directory = directory
        self._cpus = cpus
        self._load_cpus = load_cpus
        self._processes: list[subprocess.Popen[bytes]] = []
        self._generation = 0

    async def started(self) -> Running:
        """Starts it and waits for its first correct answer.

        Raises:
            ContenderUnavailable: it cannot be prepared, exited, or gave no correct answer in time.
        """
        self._generation += 1
        directory = self._directory / f"{self.contender.name}-{self._generation}"
        directory.mkdir(parents=True)
        place = Place(self._engine_port, free_port(), directory)
        launch = self.contender.prepare(place)
        log = directory / "output.log"
        for number, command in enumerate(launch.companions):
            self._processes.append(start(command, directory / f"companion-{number}.log", cpus=self._load_cpus))
        process = start(launch.command, log, cpus=self._cpus, launch=launch)
        self._processes.append(process)
        await self._answers(process, place.port, log)
        return Running(self.contender, place.port, ProcessTree(process.pid), launch.version)

    async def _answers(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        spec = AnswerSpec()
        reason = "it does not listen"
        deadline = asyncio.get_running_loop().time() + self.contender.start_secs
        while asyncio.get_running_loop().time() < deadline:
            if process.poll() is not None:
                raise ContenderUnavailable(f"it exited with status {process.returncode}: {_last_lines(log)}")
            try:
                async with Pool(port, 1) as pool:
                    counted = await repeat(pool, chat_request(port, spec), spec, count=1, timeout=5)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            if not counted.failed:
                return
            reason = next(iter(counted.faults))
            await asyncio.sleep(0.2)
        raise ContenderUnavailable(
            f"no correct answer within {self.contender.start_secs:.0f} s ({reason}): {_last_lines(log)}"
        )

    def stop(self) -> None:
        """Stops all of its processes."""
        while self._processes:
            end(self._processes.pop())


def _last_lines(log: Path, lines: int = 4) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return " | ".join(text.splitlines()[-lines:])[-600:] or "no output"


def python() -> str:
    """The interpreter that runs this."""
    return sys.executable
