"""Runs the cases: contenders take turns within each round, so that other load on the machine affects all alike."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases.case import Case, Measured, Subject
from benchmarks.contenders.contender import Contender, ContenderUnavailable
from benchmarks.contenders.direct import DIRECT
from benchmarks.contenders.process import Runner, Running, end, free_port, start
from benchmarks.results import Results

_MEASUREMENT_SECS = 400.0


@dataclass(frozen=True)
class Cpus:
    """Which process runs on which CPU. On a single CPU everything shares it, and the figures mean little."""

    gateway: set[int]
    load: set[int]


def split_cpus() -> Cpus:
    """The first CPU for the gateway, the second for the load and the engine."""
    cpus = sorted(os.sched_getaffinity(0))
    return Cpus({cpus[0]}, {cpus[1 % len(cpus)]})


@dataclass
class Bench:
    """A run. `say` gets lines on its progress."""

    contenders: Sequence[Contender]
    cases: Sequence[Case]
    rounds: int
    quick: bool
    directory: Path
    say: Callable[[str], None]

    async def run(self, results: Results) -> None:
        """Measures everything into `results`; this process moves to the load's CPU.

        Raises:
            ContenderUnavailable: the fake engine does not start.
        """
        cpus = split_cpus()
        os.sched_setaffinity(0, cpus.load)
        results.settings["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
        port = free_port()
        engine = start(
            [sys.executable, "-m", "benchmarks.engine", str(port)], self.directory / "engine.log", cpus=cpus.load
        )
        try:
            await listens(port)
            await self._measure_all(port, cpus, results)
        finally:
            end(engine)

    async def _measure_all(self, engine_port: int, cpus: Cpus, results: Results) -> None:
        entries = [
            _Entry(contender, Runner(contender, engine_port, self.directory, cpus.gateway, cpus.load))
            for contender in self.contenders
        ]
        try:
            for entry in entries:
                await self._start(entry, results)
            entries = [entry for entry in entries if entry.running is not None]
            for case in self.cases:
                for number in range(self.rounds):
                    turn = number % max(1, len(entries))
                    for entry in entries[turn:] + entries[:turn]:
                        if number == 0 or entry.contender.slowness == 1:  # slow contenders run only once
                            await self._measure(entry, case, engine_port, results)
        finally:
            for entry in entries:
                entry.runner.stop()

    async def _start(self, entry: _Entry, results: Results) -> None:
        contender = entry.contender
        try:
            entry.running = await entry.runner.started()
        except ContenderUnavailable as error:
            entry.runner.stop()
            results.skipped[contender.name] = str(error)
            self.say(f"{contender.name}: skipped: {error}")
            return
        results.contenders[contender.name] = {
            "title": contender.title,
            "version": entry.running.version,
            "switched_on": contender.switched_on,
            "slowness": str(contender.slowness),
            "workers": str(contender.workers),
        }

    async def _measure(self, entry: _Entry, case: Case, engine_port: int, results: Results) -> None:
        name = entry.contender.name
        try:
            if case.fresh or entry.running is None:
                entry.runner.stop()
                entry.running = await entry.runner.started()
            running = entry.running
            subject = Subject(
                running.port,
                engine_port,
                running.port if entry.contender is DIRECT else engine_port,
                running.tree,
                slowness=entry.contender.slowness,
                quick=self.quick,
                workers=entry.contender.workers,
            )
            measured = await asyncio.wait_for(case.measure(subject), _MEASUREMENT_SECS)
            if case.fresh:  # then stopped: nginx keeps thousands of connections, and the engine has only so many files
                entry.runner.stop()
                entry.running = None
        except (ContenderUnavailable, OSError, EOFError, asyncio.TimeoutError) as error:
            measured = Measured()
            measured.faults[f"not measured: {type(error).__name__} {error}"] += 1
            entry.runner.stop()
            entry.running = None
        results.cell(case.name, name).add(measured)
        figures = " ".join(f"{figure}={value:.4g}" for figure, value in measured.figures.items())
        faults = "; ".join(f"{count} x {fault}" for fault, count in measured.faults.items())
        self.say(f"{case.name:11} {name:12} {figures}{' FAULTS: ' + faults if faults else ''}")


@dataclass
class _Entry:
    contender: Contender
    runner: Runner
    running: Running | None = None


async def listens(port: int, within_secs: float = 10.0) -> None:
    """Waits until a server listens on the port.

    Raises:
        ContenderUnavailable: none listens after `within_secs`.
    """
    deadline = asyncio.get_running_loop().time() + within_secs
    while asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise ContenderUnavailable("the fake engine does not start")
