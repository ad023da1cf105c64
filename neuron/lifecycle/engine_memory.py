"""The memory of this host's engines: booked before a start, measured while they run, released at their end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace

from neuron.config import NeuronConfig
from neuron.engine.engine import VRAM_RELEASE_SECS, Engine, measure
from neuron.gpu.discovery import usable_cores
from neuron.gpu.topology import DeviceReading, Topology, TopologySource
from neuron.harness.registry import harness_of
from neuron.memory.cores import shared_cores
from neuron.memory.host_memory import HostMemory
from neuron.memory.ledger import EnginePlacement, Ledger
from neuron.memory.requirement import MemoryRequirement, guessed_share_mb
from neuron.progress.history import LoadHistory
from neuron.progress.load_times import LoadKey
from neuron.spec import EngineSpec
from shared.protocol import Device
from shared.tasks import timeout

_MEMORY_POLL_SECS = 0.1
_MEASURE_SECS = 2.0


class StartLocks:
    """One start at a time on each GPU: engines that profile a device at the same moment count each other's memory as
    their own. First come, first served, per device."""

    def __init__(self) -> None:
        self._locks: dict[int, asyncio.Lock] = {}

    def busy(self, devices: Collection[int]) -> bool:
        """True if another start holds or waits for one of the devices."""
        return any(self._lock(index).locked() for index in devices)

    @contextlib.asynccontextmanager
    async def held(self, devices: Collection[int]) -> AsyncIterator[None]:
        """Inside the body no other engine starts on these devices. Locked in order of index, so that two callers cannot
        deadlock."""
        async with contextlib.AsyncExitStack() as stack:
            for index in sorted(devices):
                await stack.enter_async_context(self._lock(index))
            yield

    def _lock(self, index: int) -> asyncio.Lock:
        return self._locks.setdefault(index, asyncio.Lock())


class EngineMemory:
    """Single owner of the bookings of GPU memory and of the host's RAM (`ledger`), and of the list of running engines.
    Hold `sleep_lock` while an engine falls asleep, so that two cannot count on the same RAM. Records in `history` what
    engines use of it."""

    def __init__(self, config: NeuronConfig, source: TopologySource, history: LoadHistory) -> None:
        self.ledger = Ledger()
        self.sleep_lock = asyncio.Lock()
        self.start_locks = StartLocks()
        self._engines: dict[str, Engine] = {}
        self._released = asyncio.Event()  # set, and replaced, when an engine is gone
        self._config = config
        self._source = source
        self._history = history

    @property
    def engines(self) -> list[Engine]:
        """Those whose processes run, stopping ones included."""
        return list(self._engines.values())

    def add(self, engine: Engine) -> None:
        self._engines[engine.engine_id] = engine

    def remove(self, engine: Engine) -> None:
        """The engine is gone, or left to the next neuron. Its booking stays until `Ledger.release`."""
        self._engines.pop(engine.engine_id, None)
        self._history.ended(engine.engine_id)

    async def save_history(self) -> None:
        """Writes what the engines that are gone have used."""
        await self._history.save()

    async def devices(self) -> dict[int, Device]:
        """This host's devices by index."""
        return {device.index: device for device in (await self._source.discover()).devices}

    async def unusable(self, indices: Collection[int]) -> str | None:
        """Why one of these devices cannot be used now, in words; None if all can."""
        reading = await self._source.read()
        for device in self.ledger.capacities(reading.topology, reading.health):
            if device.index in indices and device.unusable is not None:
                return str(device)
        return None

    async def read(self) -> DeviceReading:
        """Measures every engine, then asks the driver: a booking counts the rest of the used memory as foreign, so
        memory that an engine took since its last measurement must be known first."""
        await self.measure_all()
        return await self._source.read()

    def book(self, number: int, spec: EngineSpec, share_mb: int | None, reading: DeviceReading) -> EnginePlacement:
        """Books devices and memory under `number` until `Ledger.release`. Nothing is awaited, so two loads cannot book
        the same memory.

        Raises:
            InsufficientVram: the devices have not enough memory. InvalidRequest: as
            `neuron.memory.selection.check_devices`.
        """
        requirement = self._requirement(spec, share_mb, reading)
        grows = not requirement.guessed or self._may_grow(spec)
        choice = self.ledger.book(number, spec, requirement, reading.topology, reading.health, grows=grows)
        return EnginePlacement(
            number,
            choice.devices,
            choice.booked_mb,
            requirement.mb if requirement.guessed else share_mb,
            choice.why,
            choice.ram_mb,
            () if choice.devices else self._cores(number),
        )

    def adopt(self, spec: EngineSpec, placement: EnginePlacement) -> None:
        """Books for a running engine of an earlier neuron: as `Ledger.adopt`."""
        share_mb = max(placement.booked_mb, default=None)
        grows = spec.vram_mb is not None or self._may_grow(spec)
        self.ledger.adopt(placement.number, spec.key, placement.indices, share_mb, ram_mb=placement.ram_mb, grows=grows)

    def _may_grow(self, spec: EngineSpec) -> bool:
        """True if its engine may take all that it was told to at any time, even if that was a guess."""
        return harness_of(spec.harness, self._config).sizes_itself

    def _cores(self, number: int) -> tuple[int, ...]:
        others = [each.placement for each in self._engines.values() if each.placement.number != number]
        return shared_cores(usable_cores(self._config), [each.cores for each in others if not each.devices])

    def to_displace(
        self, candidates: Sequence[int], spec: EngineSpec, share_mb: int | None, reading: DeviceReading
    ) -> list[int]:
        """As `Ledger.to_displace`: which of the engines `candidates`, by booking number, must end for `spec`."""
        requirement = self._requirement(spec, share_mb, reading)
        return self.ledger.to_displace(candidates, spec, requirement, reading.topology, reading.health)

    async def rebook(self, placement: EnginePlacement, spec: EngineSpec) -> EnginePlacement:
        """Replaces the booking of an engine that is gone by one for its successor. Raises as `book`; then nothing is
        booked."""
        reading = await self.read()
        self.release(placement.number)
        return self.book(placement.number, spec, placement.share_mb, reading)

    async def host_memory(self, *, taken_mb: int = 0) -> HostMemory | None:
        """What can be taken of the host's RAM now; None where it is not counted. On a simulated host `taken_mb` is
        taken in addition."""
        reading = await self._source.read()
        topology = reading.topology
        if topology.ram is None:
            return None
        ram = self.ledger.capacities(topology, reading.health)[-1]
        taken = taken_mb if topology.simulated else 0
        left = ram.bookable_mb - ram.short_mb - taken
        return HostMemory(left + topology.ram_reserve_mb, topology.ram_reserve_mb)

    def release(self, number: int) -> None:
        """The engine of this booking is gone. Starts that wait for it look again at once."""
        self.ledger.release(number)
        released, self._released = self._released, asyncio.Event()
        released.set()

    async def until_available(self, number: int, waiting: Callable[[Sequence[str]], None]) -> None:
        """Waits until the stopping engines that booking `number` counts on are gone, and their memory is free where it
        is measured. Calls `waiting` with their names while there are any."""
        free_until: float | None = None  # when to stop waiting for memory whose engines are gone
        while True:
            released = self._released
            if free_until is None and not self.ledger.any_stops():
                return  # without asking the driver, which takes a while on a host with many GPUs
            reading = await self._source.read()
            topology, health = reading.topology, reading.health
            leaving, now = self.ledger.counts_on(number, topology, health), time.monotonic()
            if leaving:
                waiting(leaving)
                free_until = now + VRAM_RELEASE_SECS
            elif free_until is None or now >= free_until or not self.ledger.lacks_memory(number, topology, health):
                return
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(_MEMORY_POLL_SECS):
                    await released.wait()

    async def measure(self, engines: Collection[Engine]) -> None:
        """Measures `engines` with one call to the driver, and updates their bookings and what is known of their
        models."""
        held = await measure(engines, self._source)
        for engine in engines:
            grows = engine.harness.keeps_booking and engine.placement.share_mb is not None
            update = self.ledger.update_held if _fills(engine) or grows else self.ledger.settle
            file_mb = 0 if engine.ram is None else engine.ram.file_mb
            update(engine.placement.number, held[engine.placement.number], file_mb=file_mb)
            if engine.ready_at is not None and engine.ram is not None and engine.placement.ram_mb is not None:
                self._history.measured_ram(engine.engine_id, LoadKey.of(engine.spec), engine.ram.used_mb)

    async def measure_all(self) -> None:
        await self.measure(self.engines)

    async def measure_filling(self) -> None:
        """Measures the engines that load or wake: what they have taken since the last time would count as foreign."""
        with contextlib.suppress(asyncio.TimeoutError):  # a stuck driver must not delay an answer
            async with timeout(_MEASURE_SECS):
                await self.measure([engine for engine in self.engines if _fills(engine)])

    def _requirement(self, spec: EngineSpec, share_mb: int | None, reading: DeviceReading) -> MemoryRequirement:
        """With `share_mb` None by the harness's default. That is a part of a whole device, and no engine may take the
        whole RAM: there it is a guess instead."""
        # Arguments that set the engine's memory override `share_mb`, since the engine obeys them.
        args = [*spec.args, *self._config.harness_settings(spec.harness).extra_args]
        harness, topology = harness_of(spec.harness, self._config), reading.topology
        needed = harness.memory_requirement(spec, share_mb, args)
        if share_mb is not None or needed.fraction is None or not _uses_ram(spec, topology):
            return needed
        ram = self.ledger.capacities(topology, reading.health)[-1]
        guess = guessed_share_mb(ram, spec.device_count)
        guessed = harness.memory_requirement(spec, guess, args)
        return guessed if guessed.fraction is not None else replace(guessed, guessed=True)

    async def held_by(self, engine: Engine) -> dict[int, int]:
        """Measures one engine, without updating its booking: MiB by device index."""
        return (await measure([engine], self._source))[engine.placement.number]


def _fills(engine: Engine) -> bool:
    """Whether it takes more memory from moment to moment."""
    return engine.ready_at is None or engine.waking


def _uses_ram(spec: EngineSpec, topology: Topology) -> bool:
    """Whether the memory of an engine is the host's RAM, and that is counted."""
    if topology.ram is None:
        return False
    devices = [each for each in topology.devices if spec.devices is None or each.index in spec.devices]
    return all(device.unified for device in devices)
