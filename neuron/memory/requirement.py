"""How much memory an engine needs on each of its devices. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuron.memory.capacity import GpuCapacity

LARGEST_GUESS, SMALLEST_GUESS = 2, 8
"""An engine of unknown size gets this part of the host's RAM, at most and at least."""


def guessed_share_mb(ram: GpuCapacity, ranks: int) -> int:
    """MiB for each rank of an engine of unknown size in the host's RAM, or on devices that share it: half of the RAM,
    or what can be booked now if that is less, but at least an eighth."""
    largest, smallest = ram.total_mb // LARGEST_GUESS, ram.total_mb // SMALLEST_GUESS
    return max(1, max(smallest, min(largest, ram.bookable_mb)) // ranks)


@dataclass(frozen=True)
class MemoryRequirement:
    """Memory of one engine on each device: `mb` MiB, or, with `fraction`, that part of the memory that CUDA sees there.

    `one_fraction`: the engine gets `mb` as one fraction for all of its devices, calculated from the smallest. The same
    fraction of a larger device is more than `mb`. `guessed`: nothing is known of the model's size.
    """

    mb: int = 0
    fraction: float | None = None
    one_fraction: bool = False
    guessed: bool = False

    @property
    def size_known(self) -> bool:
        """False when the engine takes a fraction of the device, which says nothing about the size of its model."""
        return self.fraction is None and not self.guessed

    def on_device(self, device: GpuCapacity, smallest_mb: int) -> int:
        """MiB on one device of a set whose smallest has `smallest_mb` in total."""
        if self.fraction is not None:
            return math.ceil(self.fraction * (device.total_mb - device.reserve_mb))
        if self.one_fraction and smallest_mb > 0:
            return -(-self.mb * device.total_mb // smallest_mb)
        return self.mb

    def per_device(self, devices: Sequence[GpuCapacity]) -> tuple[int, ...]:
        """MiB on each device of a set."""
        smallest = min((device.total_mb for device in devices), default=0)
        return tuple(self.on_device(device, smallest) for device in devices)

    def __str__(self) -> str:
        return f"{self.mb} MiB" if self.fraction is None else f"{100 * self.fraction:g}% of the memory"
