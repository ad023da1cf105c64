"""The contents of `GET /discovery` and `neuron discover`, and the source of the GPU facts."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from neuron.config import NeuronConfig
from neuron.gpu.nvml import NvmlTopologySource
from neuron.gpu.simulated import SimulatedTopologySource, no_requests
from neuron.gpu.sources.amd import AmdTopologySource
from neuron.gpu.sources.configured import ConfiguredTopologySource
from neuron.gpu.topology import DeviceReading, Topology, TopologySource
from shared import __version__
from shared.protocol import Discovery, HostResources


@dataclass(frozen=True)
class HostFacts:
    """Names such as `beast`, `Debian GNU/Linux 12 (bookworm)` and `6.1.0-40-amd64`."""

    hostname: str
    os: str
    kernel: str


def host_facts() -> HostFacts:
    """Reads /etc/os-release and asks the kernel. Blocks briefly."""
    try:
        os_name = platform.freedesktop_os_release().get("PRETTY_NAME") or platform.system()
    except OSError:  # no os-release file: a minimal container, or not Linux
        os_name = platform.system()
    return HostFacts(hostname=socket.gethostname(), os=os_name, kernel=platform.release())


def topology_source(
    config: NeuronConfig, vram_dir: Path, requests_on: Callable[[int], int] = no_requests
) -> TopologySource:
    """The GPUs that a driver lists, the `[[accelerators]]`, or the simulated devices of `[simulate]`. `vram_dir` is
    where simulated engines record their memory; `requests_on` says how many requests run on a simulated device.

    Raises:
        SettingsError: `[simulate]` names an unknown device.
    """
    if config.simulate is None:
        return ConfiguredTopologySource(config.accelerators) if config.accelerators else DetectedTopologySource()
    name = config.name or socket.gethostname()
    return SimulatedTopologySource(config.simulate, vram_dir, name=name, requests_on=requests_on)


class DetectedTopologySource:
    """`neuron.gpu.topology.TopologySource` of NVIDIA's GPUs or, on a host without one, of AMD's. A host with both has
    NVIDIA's only."""

    def __init__(self) -> None:
        self._nvidia = NvmlTopologySource()
        self._amd = AmdTopologySource()
        self._chosen: TopologySource | None = None

    async def discover(self) -> Topology:
        return await (await self._source()).discover()

    async def read(self) -> DeviceReading:
        return await (await self._source()).read()

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        return await (await self._source()).process_memory_mb()

    async def close(self) -> None:
        await self._nvidia.close()
        await self._amd.close()

    async def _source(self) -> TopologySource:
        if self._chosen is None:
            self._chosen = await self._choose()
        return self._chosen

    async def _choose(self) -> TopologySource:
        """AMD's if only that has devices, or a reason why not."""
        nvidia = await self._nvidia.discover()
        if nvidia.devices:
            return self._nvidia
        amd = await self._amd.discover()
        only_amd_says_why = bool(amd.cuda_unavailable_reason) and not nvidia.cuda_unavailable_reason
        return self._amd if amd.devices or only_amd_says_why else self._nvidia


async def discovery_of(
    config: NeuronConfig, source: TopologySource, *, instance_id: str | None, network_mbps: int | None = None
) -> Discovery:
    """This host as a protocol message. A simulated host has the neuron's name, a real one its own. `network_mbps` is
    the speed of its link to the other hosts of an engine."""
    facts = await asyncio.to_thread(host_facts)
    topology = await source.discover()
    ram = topology.ram
    simulated_name = config.name if topology.simulated else None
    return Discovery(
        name=config.name,
        hostname=simulated_name or facts.hostname,
        os=facts.os,
        kernel=facts.kernel,
        cuda_version=topology.cuda_version,
        driver_version=topology.driver_version,
        devices=list(topology.devices),
        harnesses=config.harness_names,
        harness_paths=_harness_paths(config),
        links=list(topology.links),
        simulated=topology.simulated,
        instance_id=instance_id,
        version=__version__,
        cuda_unavailable_reason=topology.cuda_unavailable_reason,
        leases=True,
        instances=True,
        groups=True,
        network_mbps=network_mbps,
        host=HostResources(ram_total_mb=0 if ram is None else ram.vram_total_mb, cores=len(usable_cores(config))),
    )


def _harness_paths(config: NeuronConfig) -> dict[str, list[str]]:
    known = ((name, config.harness_settings(name).paths) for name in config.harness_names)
    return {name: list(paths) for name, paths in known if paths is not None}


def usable_cores(config: NeuronConfig) -> tuple[int, ...]:
    """The cores that engines may use, by number."""
    if config.simulate is not None and config.simulate.cores is not None:
        return tuple(range(config.simulate.cores))
    return tuple(sorted(os.sched_getaffinity(0)))
