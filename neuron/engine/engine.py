"""A running engine: its process, where it answers, and what it holds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import aiohttp

from neuron.engine import records, session, shared_memory
from neuron.engine.health import HealthMonitor
from neuron.engine.output import EngineOutput
from neuron.engine.ports import has_visible_listener, listens
from neuron.engine.process import EngineProcess
from neuron.engine.readiness import TellIdle, context_length, until_stalled
from neuron.engine.records import RunRecord
from neuron.engine.shared_memory import SharedFile
from neuron.engine.state_dir import EngineDir
from neuron.gpu.topology import TopologySource
from neuron.harness.base import EngineCommand, Harness
from neuron.memory.capacity import held_by
from neuron.memory.ledger import EnginePlacement
from neuron.memory.ram import ProcessRam, ram_of
from neuron.spec import EngineSpec
from shared.protocol import RAM

log = logging.getLogger(__name__)

VRAM_RELEASE_SECS = 30.0
_VRAM_POLL_SECS = 0.1
_RAM_SECS = 5.0  # between two measurements of what an engine that serves uses of the host's RAM
_RAM_LOADING_SECS = 0.5


@dataclass
class Engine:
    """One engine, inside `Launcher.engine` or `Launcher.adopted`, which stop and clean it up unless `leave` is set.

    `url` is where neuron reaches it. `kill`: kill it without SIGTERM first. `vram_released` is valid once it is gone.
    """

    spec: EngineSpec
    placement: EnginePlacement
    harness: Harness
    record: RunRecord  # when this neuron started or adopted the engine
    url: str
    directory: EngineDir
    process: EngineProcess
    output: EngineOutput
    health: HealthMonitor
    startup_timeout_secs: float
    stall_timeout_secs: float
    stop_timeout_secs: float
    ready_at: float | None = None  # Unix time; long ago for an adopted engine
    load_secs: float | None = None
    vram_used_mb: int | None = None  # when last measured; None: no device lists its processes
    ram: ProcessRam | None = None  # when last measured; None: its RAM is not counted
    ram_measured_at: float = 0.0  # Unix time
    checks_answered: int = 0  # health checks while it loads
    max_model_len: int | None = None  # tokens that it serves; None: it has not told
    vram_released: bool = True
    kill: bool = False
    leave: bool = False
    can_sleep: bool = False
    slept_mb: int = 0  # host memory that it takes while it sleeps
    waking: bool = False  # its memory is booked again, and not all allocated yet
    stopping: bool = False
    adapters: dict[str, str] = field(default_factory=dict)  # where its LoRA adapters come from, by name
    takes_adapters: bool = False
    adapter_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    shared_files: frozenset[SharedFile] = field(default_factory=frozenset)
    command: EngineCommand | None = None  # None: an earlier neuron started it
    from_spare: bool = False  # its process imported its modules before the load

    @property
    def engine_id(self) -> str:
        return self.record.engine_id

    @property
    def api_url(self) -> str:
        """The base of its API: the paths that begin with `/v1` are below it."""
        return self.url + self.harness.api_prefix

    @property
    def port(self) -> int:
        return self.record.port

    @property
    def counts_ram(self) -> bool:
        """True if what its processes use of the host's RAM is part of its booking."""
        placement = self.placement
        return placement.ram_mb is not None or any(device.unified for device in placement.devices)

    @property
    def ram_is_due(self) -> bool:
        """True if its RAM is to be measured again, which takes the kernel a while for a large process."""
        if not self.counts_ram:
            return False
        settled = self.ready_at is not None and self.ram_measured_at > self.ready_at
        return time.time() - self.ram_measured_at >= (_RAM_SECS if settled else _RAM_LOADING_SECS)

    @property
    def api_key(self) -> str | None:
        """None: it serves without a key."""
        return self.record.api_key

    @property
    def control_key(self) -> str:
        return self.record.control_key

    @property
    def started_at(self) -> float:
        """Unix time."""
        return self.record.started_at

    @property
    def devices(self) -> tuple[int, ...]:
        return self.placement.indices

    def answered_check(self) -> None:
        """It has answered a health check, with any status, while it loads."""
        self.checks_answered += 1

    def came_up(self) -> float:
        """It serves for the first time. Returns the seconds that its load took."""
        self.ready_at = time.time()
        self.load_secs = self.ready_at - self.started_at
        return self.load_secs

    def fell_asleep(self, slept_mb: int) -> None:
        self.slept_mb = slept_mb

    def begin_to_wake(self) -> None:
        self.waking = True

    def woke(self) -> None:
        self.waking = False
        self.slept_mb = 0

    def end_with(self, *, kill: bool, leave: bool) -> None:
        """How `Launcher` ends it: `leave` it running, `kill` it, or by default stop it."""
        self.kill, self.leave = kill, leave

    async def until_stalled(self, tell: TellIdle) -> str:
        """As `readiness.until_stalled`. Never returns for an engine that has come up once, or that loads together with
        others: it may wait for them without doing anything."""
        if self.ready_at is not None or self.spec.group is not None:
            await asyncio.Event().wait()
        return await until_stalled(
            self.process.leader,
            self.output,
            health_path=self.harness.health_path,
            checks=lambda: self.checks_answered,
            timeout_secs=self.stall_timeout_secs,
            tell=tell,
            cache_variables=self.harness.cache_variables,
        )

    async def learn_context_length(self, http: aiohttp.ClientSession) -> None:
        """Asks it for `max_model_len`. Without effect for a part without a server."""
        if self.spec.serves:
            model_id, field = self.spec.model_id, self.harness.context_field
            self.max_model_len = await context_length(http, self.api_url, self.api_key, model_id, field)

    async def owns_port(self) -> bool | None:
        """True when one of its processes listens on its port; None when neuron may not see which process does."""
        return await asyncio.to_thread(self._owns_port)

    async def record_shared_files(self) -> None:
        """Adds what it has mapped of /dev/shm now to `shared_files`, which are removed after its end."""
        self.shared_files |= await asyncio.to_thread(self._shared_files)

    def current_record(self) -> RunRecord:
        """What the next neuron needs to know to adopt it."""
        leader = self.process.leader
        return self.record.model_copy(
            update={
                "pid": leader.pid,
                "start_ticks": leader.start_ticks,
                "can_sleep": self.can_sleep,
                "ready_at": self.ready_at,
                "load_secs": self.load_secs,
                "stopping": self.stopping,
                "slept_mb": self.slept_mb,
                "takes_adapters": self.takes_adapters,
                "adapters": dict(self.adapters),
                "shared_files": sorted((file.path, file.inode) for file in self.shared_files),
            }
        )

    async def save_record(self) -> None:
        """Writes its record. On a full disk the earlier record stays, which is enough to find the engine again."""
        try:
            await asyncio.to_thread(records.write, self.directory.record, self.current_record())
        except OSError as error:
            log.warning("%s: its run record cannot be written: %s", self.spec.key, error)

    async def record_stop(self) -> None:
        """Records that it is to stop, so that the next neuron does not adopt or restart it."""
        if not self.kill and not self.stopping:
            self.stopping = True
            await self.save_record()

    def _owns_port(self) -> bool | None:
        leader = self.process.leader  # first: it is usually the one, and finding the others reads all of /proc
        if leader.alive and listens([leader.pid], self.port):
            return True
        if listens((process.pid for process in session.members(leader)), self.port):
            return True
        return False if has_visible_listener(self.port) else None

    def _shared_files(self) -> frozenset[SharedFile]:
        return shared_memory.mapped_by(session.live_members(self.process.leader))


async def measure(engines: Collection[Engine], source: TopologySource) -> dict[int, dict[int, int]]:
    """Sets `vram_used_mb` of each engine to what its processes hold now, and `ram` where it counts and is not fresh.
    Returns MiB by booking number and device index."""
    if not engines:
        return {}
    usage = await source.process_memory_mb()
    sessions = await asyncio.to_thread(session.members_by_session)
    held = {}
    for engine in engines:
        pids = sessions.get(engine.process.pid, set())
        engine.process.pids_seen |= pids
        found = held[engine.placement.number] = held_by(pids, usage)
        simulated_mb = found.pop(RAM, None)
        engine.vram_used_mb = sum(found.values()) if found else None
        if engine.ram_is_due:
            engine.ram = await asyncio.to_thread(ram_of, pids) if simulated_mb is None else ProcessRam(simulated_mb)
            engine.ram_measured_at = time.time()
        if engine.counts_ram and engine.ram is not None:
            found[RAM] = engine.ram.used_mb
    return held


def memory_of(pids: set[int], usage: Mapping[int, Mapping[int, int]]) -> int | None:
    """MiB that the processes hold on all devices together; None when no device lists any of them."""
    held = held_by(pids, usage)
    return sum(held.values()) if held else None


async def until_released(source: TopologySource, pids: set[int], *, timeout_secs: float = VRAM_RELEASE_SECS) -> bool:
    """Waits until no device lists any of the processes; False when one still does after `timeout_secs`.

    A driver takes a moment to remove the context of a killed process.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_secs
    while memory_of(pids, await source.process_memory_mb()) is not None:
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_VRAM_POLL_SECS)
    return True
