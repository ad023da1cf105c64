"""A host's RAM beside its devices: one source for the figures of both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from neuron.config import NeuronConfig, SimulateSettings
from neuron.gpu import simulated_vram as vram
from neuron.gpu.topology import DeviceReading, Topology, TopologySource
from neuron.memory.ram import RamFigures, host_ram
from shared.gpus import ram_reserve_mb
from shared.protocol import RAM, Device, DeviceHealth

log = logging.getLogger(__name__)


class RamSource(Protocol):
    """Reads the host's RAM. No method blocks the event loop, or raises."""

    async def figures(self) -> RamFigures | None:
        """What there is and what is available now; None where it is not counted."""
        ...

    async def process_mb(self) -> Mapping[int, int]:
        """MiB by process id, of processes whose memory is only simulated."""
        ...


class RealRam:
    """`RamSource` of this host."""

    def __init__(self) -> None:
        self._told = False

    async def figures(self) -> RamFigures | None:
        try:
            return await asyncio.to_thread(host_ram)
        except (OSError, KeyError, ValueError) as error:
            if not self._told:
                self._told = True
                log.warning("the host's RAM cannot be read, so it is not booked: %s", error)
            return None

    async def process_mb(self) -> Mapping[int, int]:
        return {}


class SimulatedRam:
    """`RamSource` of a simulated host: `ram_mb`, or the memory of its unified devices. What simulated engines hold in
    RAM and on those is used; None without both."""

    def __init__(self, settings: SimulateSettings, vram_dir: Path) -> None:
        self._total_mb = settings.ram_mb
        self._vram_dir = vram_dir
        self._unified: tuple[str, ...] = ()

    def share_with(self, devices: Sequence[Device]) -> None:
        """These devices have no memory of their own."""
        self._unified = tuple(device.uuid for device in devices if device.uuid is not None)
        if self._total_mb is None:
            self._total_mb = max((device.vram_total_mb for device in devices), default=None)

    async def figures(self) -> RamFigures | None:
        if self._total_mb is None:
            return None
        used = await asyncio.to_thread(vram.used_mb, self._vram_dir)
        return RamFigures(
            self._total_mb, max(0, self._total_mb - sum(used[each] for each in (vram.RAM_NAME, *self._unified)))
        )

    async def process_mb(self) -> Mapping[int, int]:
        usage = await asyncio.to_thread(vram.usage_by_process, self._vram_dir)
        return {pid: held.get(vram.RAM_NAME, 0) for pid, held in usage.items()}


class HostTopologySource:
    """`neuron.gpu.topology.TopologySource` with the host's RAM under the index `RAM`, and the figures of devices that
    share it. `reserve_mb` of it stay free; None: the default."""

    def __init__(self, devices: TopologySource, ram: RealRam | SimulatedRam, *, reserve_mb: int | None = None) -> None:
        self._devices = devices
        self._ram = ram
        self._reserve_mb = reserve_mb
        self._total_mb: int | None = None

    async def discover(self) -> Topology:
        return await self._with_ram(await self._devices.discover())

    async def _with_ram(self, topology: Topology) -> Topology:
        unified = [device for device in topology.devices if device.unified]
        if unified and isinstance(self._ram, SimulatedRam):
            self._ram.share_with(unified)
        if self._total_mb is None:
            figures = await self._ram.figures()
            self._total_mb = None if figures is None else figures.total_mb
        total = self._total_mb
        if total is None:
            return topology
        devices = tuple(
            device.model_copy(update={"vram_total_mb": total}) if device.unified else device
            for device in topology.devices
        )
        ram = Device(index=RAM, name=vram.RAM_NAME, vram_total_mb=total)
        reserve = ram_reserve_mb(total) if self._reserve_mb is None else self._reserve_mb
        return replace(topology, devices=devices, ram=ram, ram_reserve_mb=reserve)

    async def read(self) -> DeviceReading:
        reading = await self._devices.read()
        topology, figures = await self._with_ram(reading.topology), await self._ram.figures()
        if figures is None:
            return DeviceReading(topology, reading.health)
        unified = {device.index for device in topology.devices if device.unified}
        memory = {"vram_used_mb": figures.used_mb, "vram_free_mb": figures.available_mb}
        found = [each.model_copy(update=memory) if each.index in unified else each for each in reading.health]
        return DeviceReading(topology, [*found, DeviceHealth(index=RAM, **memory)])

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        usage = await self._devices.process_memory_mb()
        simulated = await self._ram.process_mb()
        return {**usage, RAM: simulated} if simulated else usage

    async def close(self) -> None:
        await self._devices.close()


def with_host_ram(devices: TopologySource, config: NeuronConfig, vram_dir: Path) -> HostTopologySource:
    """`vram_dir` is where simulated engines record their memory."""
    ram = RealRam() if config.simulate is None else SimulatedRam(config.simulate, vram_dir)
    return HostTopologySource(devices, ram, reserve_mb=config.sleep.ram_reserve_mb)
