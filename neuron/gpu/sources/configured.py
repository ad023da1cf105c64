"""Accelerators that no driver's library describes: neuron books what neuron.toml says and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neuron.config import AcceleratorEntry
from neuron.gpu.topology import DeviceReading, Topology
from shared.protocol import Device, DeviceHealth
from shared.protocol.topology import UNKNOWN_VENDOR


class ConfiguredTopologySource:
    """`neuron.gpu.topology.TopologySource` of `[[accelerators]]`, numbered in the order written."""

    def __init__(self, entries: Sequence[AcceleratorEntry]) -> None:
        listed = [entry for entry in entries for _ in range(entry.count)]
        self._topology = Topology(
            devices=tuple(
                Device(index=index, vendor=UNKNOWN_VENDOR, name=entry.name, vram_total_mb=entry.memory_mb)
                for index, entry in enumerate(listed)
            ),
            device_variable=listed[0].variable if listed else None,
        )

    async def discover(self) -> Topology:
        return self._topology

    async def read(self) -> DeviceReading:
        """As if nothing were in use: what is booked is all that is known."""
        devices = self._topology.devices
        free = [DeviceHealth(index=device.index, vram_free_mb=device.vram_total_mb) for device in devices]
        return DeviceReading(self._topology, free)

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        return {}

    async def close(self) -> None:
        """Does nothing."""
