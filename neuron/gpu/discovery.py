"""What `GET /discovery` and `neuron discover` answer, and where the GPU facts come from."""

from __future__ import annotations

import asyncio
import platform
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from neuron.config import NeuronConfig
from neuron.gpu.discovery_table import table_of
from neuron.gpu.nvml import NvmlTopologySource
from neuron.gpu.simulated import SimulatedTopologySource
from neuron.gpu.topology import TopologySource
from shared import __version__
from shared.protocol import Discovery


@dataclass(frozen=True)
class HostFacts:
    """Names such as `beast`, `Debian GNU/Linux 12 (bookworm)` and `6.1.0-40-amd64`."""

    hostname: str
    os: str
    kernel: str


def host_facts() -> HostFacts:
    """Reads /etc/os-release and asks the kernel; blocks, shortly."""
    try:
        os_name = platform.freedesktop_os_release().get("PRETTY_NAME") or platform.system()
    except OSError:  # no os-release file: a minimal container, or not Linux
        os_name = platform.system()
    return HostFacts(hostname=socket.gethostname(), os=os_name, kernel=platform.release())


def topology_source(config: NeuronConfig, vram_dir: Path) -> TopologySource:
    """NVML, or with `[simulate]` what that says. `vram_dir` is where simulated engines record their memory.

    Raises:
        SettingsError: `[simulate]` names a device that is not known.
    """
    if config.simulate is None:
        return NvmlTopologySource()
    return SimulatedTopologySource(config.simulate, vram_dir, name=config.name or socket.gethostname())


async def discovery_of(config: NeuronConfig, source: TopologySource, *, instance_id: str | None) -> Discovery:
    """This host as the protocol describes it. A simulated host goes by the neuron's name, a real one by its own."""
    facts = await asyncio.to_thread(host_facts)
    topology = await source.discover()
    simulated_name = config.name if topology.simulated else None
    return Discovery(
        hostname=simulated_name or facts.hostname,
        os=facts.os,
        kernel=facts.kernel,
        cuda_version=topology.cuda_version,
        driver_version=topology.driver_version,
        devices=list(topology.devices),
        harnesses=config.harness_names,
        links=list(topology.links),
        simulated=topology.simulated,
        instance_id=instance_id,
        version=__version__,
        cuda_unavailable_reason=topology.cuda_unavailable_reason,
    )


def run_discover(config: NeuronConfig | None, as_json: bool) -> int:
    """`neuron discover`: prints this host to standard output, as JSON or as tables. Without a config: NVML's GPUs.

    Returns:
        The exit status: 0, also when there is no GPU or none can be used; that is an answer.

    Raises:
        SettingsError: `[simulate]` names a device that is not known.
    """
    discovery = asyncio.run(_discover_once(config or NeuronConfig()))
    text = discovery.model_dump_json(indent=2) + "\n" if as_json else table_of(discovery)
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


async def _discover_once(config: NeuronConfig) -> Discovery:
    source = topology_source(config, config.state_directory(config.port) / "vram")
    try:
        return await discovery_of(config, source, instance_id=None)
    finally:
        await source.close()
