"""How much memory an engine needs on each of its devices. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuron.memory.capacity import DeviceRoom


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of one engine on each device: `mb` MiB, or, with `fraction`, that part of what CUDA sees of the device.

    `one_fraction`: the engine is given `mb` as one fraction for all of its devices, the one with which the smallest of
    them gives `mb`. Of a larger one it wants the same fraction, which is more.
    """

    mb: int = 0
    fraction: float | None = None
    one_fraction: bool = False

    @property
    def size_known(self) -> bool:
        """False when the engine takes what the device has: then nothing tells how large its model is."""
        return self.fraction is None

    def on(self, room: DeviceRoom, smallest_mb: int) -> int:
        """MiB on a device, in a set whose smallest has `smallest_mb` in total."""
        if self.fraction is not None:
            return math.ceil(self.fraction * (room.total_mb - room.reserve_mb))
        if self.one_fraction and smallest_mb > 0:
            return -(-self.mb * room.total_mb // smallest_mb)
        return self.mb

    def shares(self, rooms: Sequence[DeviceRoom]) -> tuple[int, ...]:
        """MiB on each device of a set."""
        smallest = min((room.total_mb for room in rooms), default=0)
        return tuple(self.on(room, smallest) for room in rooms)

    def __str__(self) -> str:
        return f"{self.mb} MiB" if self.fraction is None else f"{100 * self.fraction:g}% of the memory"
