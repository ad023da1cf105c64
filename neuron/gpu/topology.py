"""The interface of GPU sources: NVML (`neuron.gpu.nvml`), those of `neuron.gpu.sources`, and the simulated one
(`neuron.gpu.simulated`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.protocol import Device, DeviceHealth, Link
from shared.protocol.interconnect import DevicePath, Pair, paths_between
from shared.protocol.topology import combinable_numa_nodes

MIG_MARK = " MIG "
"""Stands in the name of a MIG instance before its profile, as in "NVIDIA A100-SXM4-80GB MIG 1g.10gb"."""
_MIG_INDICES = 100  # for each GPU: more than a host has GPUs, and than a GPU has instances


def mig_index(gpu: int, gpu_instance: int) -> int:
    """The index of a MIG instance as a device: 109 for GPU instance 9 of GPU 0, 201 for GPU instance 1 of GPU 1."""
    return _MIG_INDICES * (gpu + 1) + gpu_instance


def mig_parent(index: int) -> int:
    """The index of the GPU of the MIG instance with this index. A GPU's own index gives -1."""
    return index // _MIG_INDICES - 1


def gpu_instance_of(index: int) -> int:
    """The id of the GPU instance with this index."""
    return index % _MIG_INDICES


@dataclass(frozen=True)
class Topology:
    """The GPUs of this host and their MIG instances; only these and `Device.lost` change while the process lives.

    The driver reports nothing about a pair of devices that `links` lacks.

    `ram` is the host's RAM, with the index `RAM`; None where it is not counted. `ram_reserve_mb` of it stay free for
    other programs.

    `cuda_unavailable_reason` says why no GPU can be used although the host has an NVIDIA or AMD stack (driver/library
    mismatch, no permission); None when all is well, and on a host without one.

    `device_variable` is the environment variable in which engines get the indices of devices of an unknown vendor.
    """

    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    cuda_unavailable_reason: str | None = None
    simulated: bool = False
    ram: Device | None = None
    ram_reserve_mb: int = 0
    device_variable: str | None = None

    @property
    def has_gpu(self) -> bool:
        """True when engines run on real GPUs; False on a CPU host and on a simulated one."""
        return bool(self.devices) and not self.simulated

    @property
    def paths(self) -> Mapping[Pair, DevicePath]:
        """The path of each pair of devices that an engine may use together, in both orders."""
        return paths_between(combinable_numa_nodes(self.devices), self.links)


@dataclass(frozen=True)
class DeviceReading:
    """One look at the devices: `health` has the live figures of every device that answers, by index; of RAM too, where
    it is counted. `topology` is that of the same moment."""

    topology: Topology
    health: Sequence[DeviceHealth]


class TopologySource(Protocol):
    """Reads GPU facts. No method blocks the event loop, or raises for a failure of hardware or driver."""

    async def discover(self) -> Topology:
        """The topology. The first call asks the driver; later calls ask only for MIG instances, and give `lost` of each
        device as of the last reading.
        """
        ...

    async def read(self) -> DeviceReading:
        """The live figures. Each call asks the driver."""
        ...

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        """What each process holds now, neuron's or not: device index -> pid -> MiB.

        Lacks processes whose memory the driver does not report, and devices that do not answer.
        """
        ...

    async def close(self) -> None:
        """Releases the driver."""
        ...
