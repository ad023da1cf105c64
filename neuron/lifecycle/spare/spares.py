"""Keeps a spare process for each kind of engine: when one is made, given to a load, or dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from neuron.config import NeuronConfig
from neuron.engine.engine import Engine
from neuron.engine.state_dir import StateDir
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.spare.program import NotPython
from neuron.lifecycle.spare.spare import Spare, SpareFailed, SpareOrigin, SpareState
from shared.protocol import SpareView
from shared.tasks import first_of

log = logging.getLogger(__name__)

CHECK_SECS = 5.0
"""Between two looks at the host's memory."""
FIRST_PAUSE_SECS = 30.0
LONGEST_PAUSE_SECS = 3600.0
_FIRST_GUESS_MB = 1024  # until a harness's first spare has been measured


@dataclass
class _Kind:
    """The spare of one harness, and what is known for the next. `blocked`: it can have none, as the log says
    (`told`), until the next load: its program may change."""

    origin: SpareOrigin
    spare: Spare | None = None
    size_mb: int = _FIRST_GUESS_MB
    failures: int = 0
    retry_at: float = 0.0  # monotonic
    blocked: bool = False
    told: str = ""


class Spares:
    """Single owner of the spare processes. They are made by the task `run`, one at a time and only while no load runs.

    A harness gets one after its first load: what that load was started with is what the next is likely to need.
    """

    def __init__(self, config: NeuronConfig, state: StateDir, numbers: Iterator[int], memory: EngineMemory) -> None:
        self._config = config
        self._state = state
        self._numbers = numbers
        self._memory = memory
        self._kinds: dict[str, _Kind] = {}
        self._pauses = 0
        self._pause_began = asyncio.Event()
        self._changed = asyncio.Event()

    @property
    def memory_mb(self) -> int:
        """MiB of host memory that the spares take, as last measured."""
        return sum(kind.size_mb for kind in self._kinds.values() if kind.spare is not None)

    def views(self) -> list[SpareView]:
        """The spare processes as callers see them."""
        return [
            SpareView(harness=name, pid=spare.process.pid, state=spare.state.value, memory_mb=kind.size_mb)
            for name, kind in self._kinds.items()
            if (spare := kind.spare) is not None
        ]

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """In the body an engine loads or falls asleep: no spare is made, and one that still imports is dropped, as it
        would slow the load down or take the memory."""
        self._pauses += 1
        self._pause_began.set()
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._pause_began.clear()
                self._changed.set()

    def take(self, harness: str) -> Spare | None:
        """A spare that is ready, which is the caller's from now on; None when there is none."""
        kind = self._kinds.get(harness)
        if kind is None or kind.spare is None or kind.spare.state is not SpareState.READY:
            return None
        spare, kind.spare = kind.spare, None
        self._changed.set()
        return spare

    def loaded(self, engine: Engine) -> None:
        """A load succeeded: its harness gets a spare, if it is configured and the harness can have one."""
        name = engine.spec.harness
        imports = None if engine.command is None else engine.harness.early_imports(engine.command.env)
        if imports is None or engine.command is None or not self._wanted(name, automatic=imports.automatic):
            return
        origin = SpareOrigin(engine.command, engine.placement.devices, imports)
        kind = self._kinds.setdefault(name, _Kind(origin))
        kind.origin, kind.blocked = origin, False
        if engine.from_spare:
            kind.failures = 0
        self._changed.set()

    def failed(self, harness: str, reason: str) -> None:
        """A spare could not be made or did not become a working engine: pauses before the next one."""
        kind = self._kinds[harness]
        kind.failures += 1
        pause = min(FIRST_PAUSE_SECS * 4.0 ** min(kind.failures - 1, 10), LONGEST_PAUSE_SECS)
        kind.retry_at = time.monotonic() + pause
        log.warning("harness %s: its spare process failed, next try in %.0f s: %s", harness, pause, reason)

    async def drop_automatic(self) -> bool:
        """Ends the spares that the configuration does not insist on, so that their memory is free; True if there were
        any."""
        automatic = [name for name in self._kinds if self._config.harness_settings(name).spare is not True]
        return any([await self._drop(name, "its memory is needed") for name in automatic])

    async def run(self) -> None:
        """Makes, watches and drops spares until it is cancelled."""
        while True:
            self._changed.clear()
            for name in list(self._kinds):
                await self._tend(name)
            waiting = {name: kind.spare for name, kind in self._kinds.items() if kind.spare is not None}
            ends = {name: spare.process.main_exited.wait() for name, spare in waiting.items()}
            ended = await first_of({**ends, "": self._changed.wait()}, timeout_secs=CHECK_SECS)
            if ended and self._kinds[ended].spare is waiting[ended]:
                await self._drop(ended, None)
                self.failed(ended, "it ended while it waited")

    async def close(self) -> None:
        """Ends every spare."""
        for name in self._kinds:
            await self._drop(name, None)

    def _wanted(self, harness: str, *, automatic: bool) -> bool:
        setting = self._config.harness_settings(harness).spare
        return automatic if setting == "auto" else setting

    async def _tend(self, name: str) -> None:
        kind = self._kinds[name]
        has_room = await self._has_room(name, 0 if kind.spare is not None else kind.size_mb)
        if kind.spare is not None:
            if has_room:
                kind.size_mb = await asyncio.to_thread(kind.spare.memory_mb) or kind.size_mb
            else:
                await self._drop(name, "the host runs out of memory")
        elif has_room and not kind.blocked and not self._pauses and time.monotonic() >= kind.retry_at:
            await self._make(name, kind)

    async def _has_room(self, name: str, size_mb: int) -> bool:
        if self._config.harness_settings(name).spare is True:
            return True
        memory = await self._memory.host_memory(taken_mb=self.memory_mb)
        return memory is None or memory.has_room(size_mb)

    async def _make(self, name: str, kind: _Kind) -> None:
        number = next(self._numbers)
        try:
            directory = await asyncio.to_thread(self._state.new_engine, number)
        except OSError as error:
            self.failed(name, f"cannot create its directory: {error}")
            return
        spare = None
        try:
            spare = await Spare.start(kind.origin, number, f"{self._state.engine_id_prefix}{number}", directory)
            kind.spare = spare
            ready, pause = spare.until_ready(), self._pause_began.wait()
            if await first_of({"pause": pause, "ready": ready}) == "pause":
                await self._drop(name, None)
                return
            # From here on a load may take it at any time, with its directory.
            kind.size_mb = await asyncio.to_thread(spare.memory_mb) or kind.size_mb
            log.info("harness %s: spare process %d is ready (%d MiB)", name, spare.process.pid, kind.size_mb)
        except NotPython as error:
            kind.blocked = True
            if kind.told != str(error):
                kind.told = str(error)
                log.info("harness %s: no spare process is possible: %s", name, error)
        except SpareFailed as error:
            self.failed(name, str(error))
            await self._drop(name, None)
        finally:
            if spare is None:
                await asyncio.to_thread(directory.remove)

    async def _drop(self, name: str, why: str | None) -> bool:
        """True if there was a spare. `why` goes to the log."""
        kind = self._kinds[name]
        spare, kind.spare = kind.spare, None
        if spare is None:
            return False
        if why is not None:
            log.info("harness %s: spare process %d is dropped: %s", name, spare.process.pid, why)
        await spare.close()
        await asyncio.to_thread(spare.directory.remove)
        return True
