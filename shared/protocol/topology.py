"""Hardware and software of a host. Only MIG instances and `Device.lost` change during the lifetime of a neuron
process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Final

from pydantic import Field

from shared.protocol.base import PROTOCOL_V1, Mib, NameList, Text, WireModel
from shared.protocol.interconnect import DevicePath, Link, Pair, paths_between

GPU_KIND: Final = "gpu"
MIG_KIND: Final = "mig"
NVIDIA: Final = "nvidia"
AMD: Final = "amd"
UNKNOWN_VENDOR: Final = "unknown"
RAM: Final = -1
"""The index under which neuron and cortex count the host's RAM beside its devices. Of what is sent only the figures in
a refusal have it."""


class Device(WireModel):
    """One GPU, or one MIG instance of a GPU (`kind` "mig"): `parent` is the index of that GPU, `profile` its size, such
    as "1g.10gb". The GPU itself is listed with `mig_mode` True, and computes only in its instances.

    `unified`: it shares the host's RAM, and `vram_total_mb` is that of the host. `lost`: the GPU fell off the bus. It
    is listed for the operator, and nothing is placed on it. `vendor`: "nvidia", "amd", or "unknown" for one that is not
    measured, with the memory that neuron.toml says.
    """

    index: int
    kind: Text = GPU_KIND
    parent: int | None = None
    profile: Text | None = None
    vendor: Text = NVIDIA
    name: Text = ""
    vram_total_mb: Mib = 0
    compute_capability: Text | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    unified: bool = False
    mig_mode: bool | None = None  # None: the device does not support MIG
    lost: str | None = None  # why the device is unusable, None if it is usable

    @property
    def usable(self) -> bool:
        """Whether an engine can be placed on it: it is neither lost nor split into MIG instances."""
        return self.lost is None and not self.mig_mode

    @property
    def is_mig_instance(self) -> bool:
        return self.kind == MIG_KIND


def combinable_numa_nodes(devices: Iterable[Device]) -> dict[int, int | None]:
    """The NUMA nodes of the devices that an engine may use together, by index: all but MIG instances."""
    return {device.index: device.numa_node for device in devices if not device.is_mig_instance}


class HostResources(WireModel):
    """What the host has besides its devices: RAM in MiB, at most what neuron's container may use, 0 where it is not
    counted; and the cores that neuron may use."""

    ram_total_mb: Mib = 0
    cores: int = 0


class Discovery(WireModel):
    """Reply to `GET /discovery`.

    `name` is that of its neuron.toml, None without one.
    Without an `instance_id` (protocol v1) a restart cannot be told from a pause. `leases`: it answers
    `POST /models/lease`. `instances`: it can run several engines of one model. `groups`: it can run a part of an engine
    that spans several neurons. `network_mbps`: the speed of this host's interface for such engines, in Mbit/s; None if
    the system does not know it. `host`: its RAM, which models with `devices = 0` are placed in; None if it does not
    tell. `harness_paths`: the paths that engines of a harness serve, for each harness that says so.
    """

    name: Text | None = None
    hostname: Text = ""
    os: Text = ""
    kernel: Text = ""
    cuda_version: Text | None = None
    driver_version: Text | None = None
    devices: Annotated[list[Device], PROTOCOL_V1] = Field(default_factory=list)
    harnesses: list[Text] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    simulated: bool = False
    instance_id: str | None = None
    version: str | None = None
    cuda_unavailable_reason: str | None = None
    leases: bool = False
    instances: bool = False
    groups: bool = False
    network_mbps: int | None = None
    host: HostResources | None = None
    harness_paths: dict[str, NameList] = Field(default_factory=dict)

    @cached_property
    def paths(self) -> Mapping[Pair, DevicePath]:
        """The path of each pair of devices that an engine may use together, in both orders."""
        return paths_between(combinable_numa_nodes(self.devices), self.links)

    @cached_property
    def path_weights(self) -> Mapping[int, Mapping[int, int]]:
        """By device, the `DevicePath.weight` of its path to each other device, without those of 0."""
        found: dict[int, dict[int, int]] = {}
        for (a, b), path in self.paths.items():
            if path.weight:
                found.setdefault(a, {})[b] = path.weight
        return found
