"""Which engine is on which device, and how much of it each was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from neuron.devices import choose
from neuron.spec import EngineSpec
from neuron.topology import Topology
from shared.protocol import Device, DeviceHealth


class Occupancy:
    """Chooses devices and remembers the choice at once, so that two loads at the same moment do not both take the
    emptiest device before either has taken any memory."""

    def __init__(self) -> None:
        self._placed: dict[int, tuple[tuple[Device, ...], int]] = {}  # engine number -> devices, MiB promised on each

    def place(
        self, number: int, spec: EngineSpec, topology: Topology, health: Sequence[DeviceHealth]
    ) -> tuple[Device, ...]:
        """The devices for engine `number`; its own until `leave`."""
        measured = {device.index: float(device.vram_free_mb) for device in health}
        promised: Counter[int] = Counter()
        engines: Counter[int] = Counter()
        for devices, share in self._placed.values():
            for device in devices:
                engines[device.index] += 1
                promised[device.index] += share
        free = {
            device.index: min(measured.get(device.index, 0), device.vram_total_mb - promised[device.index])
            for device in topology.devices
        }
        chosen = choose(spec, topology, free_mb=free, engines=engines)
        self._placed[number] = (chosen, round((spec.vram_mb or 0) / spec.tensor_parallel))
        return chosen

    def keep(self, number: int, spec: EngineSpec, devices: tuple[Device, ...]) -> None:
        """For an engine that is there already."""
        self._placed[number] = (devices, round((spec.vram_mb or 0) / spec.tensor_parallel))

    def leave(self, number: int) -> None:
        self._placed.pop(number, None)
