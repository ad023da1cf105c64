"""A running engine: its process, where it answers, and what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from neuron import session
from neuron.engine_log import EngineLog
from neuron.harness import Harness
from neuron.listener import listens
from neuron.process import EngineProcess
from neuron.spec import EngineSpec
from neuron.state_dir import EngineDir
from neuron.topology import TopologySource

VRAM_RELEASE_SECS = 30.0
_VRAM_POLL_SECS = 0.1


@dataclass
class Engine:
    """Exists inside `Launcher.engine`, which starts it and leaves nothing of it behind.

    `url` is where neuron reaches it. `vram_released` is known after its end.
    """

    spec: EngineSpec
    harness: Harness
    devices: tuple[int, ...]
    port: int
    url: str
    api_key: str
    directory: EngineDir
    process: EngineProcess
    startup_timeout_secs: float
    stop_timeout_secs: float
    vram_used_mb: int | None = None  # when last measured; None: no device knows its processes
    vram_released: bool = True

    @property
    def log(self) -> EngineLog:
        return EngineLog(self.directory.log)

    async def owns_port(self) -> bool:
        """True when one of its processes is seen to listen on its port."""
        return await asyncio.to_thread(self._owns_port)

    def _owns_port(self) -> bool:
        return listens((process.pid for process in session.members(self.process.pid)), self.port)


async def measure(engines: Collection[Engine], source: TopologySource) -> None:
    """Sets `vram_used_mb` of each engine to what its processes hold now."""
    if not engines:
        return
    usage = await source.process_memory_mb()
    sessions = await asyncio.to_thread(session.members_by_session)
    for engine in engines:
        pids = sessions.get(engine.process.pid, set())
        engine.process.pids_seen |= pids
        engine.vram_used_mb = memory_of(pids, usage)


def memory_of(pids: set[int], usage: Mapping[int, Mapping[int, int]]) -> int | None:
    """MiB that the processes hold on all devices together, None when no device knows any of them."""
    held = [mb for by_pid in usage.values() for pid, mb in by_pid.items() if pid in pids]
    return sum(held) if held else None


async def until_released(source: TopologySource, pids: set[int], *, timeout_secs: float = VRAM_RELEASE_SECS) -> bool:
    """True once no device lists any of the processes, False when one still does after `timeout_secs`.

    A driver takes a moment to tear down the context of a process that was killed.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_secs
    while memory_of(pids, await source.process_memory_mb()) is not None:
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_VRAM_POLL_SECS)
    return True
