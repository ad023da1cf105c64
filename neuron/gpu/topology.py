"""The interface of GPU sources: the real one (`neuron.gpu.nvml`) and the simulated one (`neuron.gpu.simulated`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.protocol import Device, DeviceHealth, Link


@dataclass(frozen=True)
class Topology:
    """The GPUs of this host; constant while the process lives, but for `Device.lost`.

    A pair of devices that `links` lacks is one that the driver says nothing about.

    `cuda_unavailable_reason` says why no GPU can be used although an NVIDIA stack is there (driver/library mismatch,
    no permission); None when all is well and when the host simply has no NVIDIA stack.
    """

    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    cuda_unavailable_reason: str | None = None
    simulated: bool = False

    @property
    def has_gpu(self) -> bool:
        """True when engines run on real GPUs; False on a CPU host and on a simulated one."""
        return bool(self.devices) and not self.simulated


class TopologySource(Protocol):
    """Reads GPU facts. No method blocks the event loop, and none raises for what hardware or driver do."""

    async def discover(self) -> Topology:
        """The topology. The first call asks the driver; later ones give the same answer, with each device's `lost` as
        the last live reading found it.
        """
        ...

    async def health(self) -> Sequence[DeviceHealth]:
        """Live figures of every device that answers, by index. Asks anew on each call."""
        ...

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        """What each process holds now, of any owner: device index -> pid -> MiB.

        A process whose figure the driver does not give is left out, and so is a device that does not answer.
        """
        ...

    async def close(self) -> None:
        """Lets go of the driver."""
        ...
