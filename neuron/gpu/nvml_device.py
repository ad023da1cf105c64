"""Reads one GPU through nvidia-ml-py. Every function blocks: `neuron.gpu.nvml` calls them in its own thread.

A figure that a device or driver lacks is None. Functions raise `pynvml.NVMLError` only if the GPU is gone or does not
report its memory, which every working GPU with memory of its own does.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from neuron.gpu.links import NvLinks
from neuron.gpu.nvml_errors import means_gone, means_unsupported
from shared.protocol import Device, DeviceHealth

Handle = Any
Figure = TypeVar("Figure")

MIB = 1024 * 1024
_MJ_PER_WH = 3.6e6
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def figure_or_none(read: Callable[..., Figure], *arguments: Any) -> Figure | None:
    """A figure that some devices lack; None then.

    Raises:
        pynvml.NVMLError: the device is gone.
    """
    try:
        return read(*arguments)
    except pynvml.NVMLError as error:
        if means_gone(error):
            raise
        return None


def read_device(index: int, handle: Handle) -> Device:
    """The facts of one GPU. `neuron.gpu.nvml_mig` reads its MIG mode.

    Raises:
        pynvml.NVMLError: the device is gone, or does not report its memory.
    """
    total, _, _ = read_memory(handle)
    # A GPU without memory of its own shares the host's (GB10, Jetson): `neuron.memory.host` adds its figures.
    pci = figure_or_none(pynvml.nvmlDeviceGetPciInfo, handle)
    capability = figure_or_none(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Device(
        index=index,
        name=figure_or_none(pynvml.nvmlDeviceGetName, handle) or "",
        uuid=figure_or_none(pynvml.nvmlDeviceGetUUID, handle),
        vram_total_mb=total // MIB,
        unified=total == 0,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        pci_bus_id=None if pci is None else pci.busId,
        numa_node=_numa_node(handle, pci),
    )


def read_lost_device(index: int, handle: Handle, reason: str) -> Device:
    """An unusable GPU, with the facts that the driver still reports."""
    known: dict[str, Any] = {}
    for field, read in (("name", pynvml.nvmlDeviceGetName), ("uuid", pynvml.nvmlDeviceGetUUID)):
        with contextlib.suppress(pynvml.NVMLError):
            known[field] = read(handle)
    with contextlib.suppress(pynvml.NVMLError):
        known["pci_bus_id"] = pynvml.nvmlDeviceGetPciInfo(handle).busId
    return Device(index=index, lost=reason, **known)


def read_memory(handle: Handle) -> tuple[int, int, int]:
    """(total, used, free) in bytes; zeros for a GPU that shares the host's memory.

    Version 2 of the call does not count the driver's reserve as used; old drivers only have version 1, which does.

    Raises:
        pynvml.NVMLError: the memory cannot be read, for another reason than that there is none.
    """
    for version in (pynvml.nvmlMemory_v2, None):
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
        except pynvml.NVMLError as error:
            if not means_unsupported(error):
                raise
        else:
            return memory.total, memory.used, memory.free
    return 0, 0, 0


def read_health(index: int, handle: Handle) -> DeviceHealth:
    """The live figures of one GPU.

    Raises:
        pynvml.NVMLError: the device is gone, or does not report its memory.
    """
    _, used, free = read_memory(handle)
    utilization = figure_or_none(pynvml.nvmlDeviceGetUtilizationRates, handle)
    milliwatts = figure_or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
    millijoules = figure_or_none(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)  # from Volta on
    return DeviceHealth(
        index=index,
        vram_used_mb=used // MIB,
        vram_free_mb=free // MIB,
        utilization_pct=None if utilization is None else utilization.gpu,
        temp_c=_temperature(handle),
        power_w=None if milliwatts is None else milliwatts / 1000,
        energy_wh=None if millijoules is None else millijoules / _MJ_PER_WH,
    )


def _temperature(handle: Handle) -> float | None:
    """Degrees Celsius of the GPU's core sensor; drivers before 560 only have the older call."""
    for read in (pynvml.nvmlDeviceGetTemperatureV, pynvml.nvmlDeviceGetTemperature):
        value = figure_or_none(read, handle, pynvml.NVML_TEMPERATURE_GPU)
        if value is not None:
            return float(value)
    return None


def _numa_node(handle: Handle, pci: Any) -> int | None:
    """The NUMA node whose CPUs and memory are nearest to the GPU; None on a host without NUMA.

    Read from the memory affinity, as `nvidia-smi topo -m` does. (nvmlDeviceGetNumaNodeId is the node that a coherent
    GPU's own memory forms.) Falls back to the kernel's value.
    """
    affinity = figure_or_none(pynvml.nvmlDeviceGetMemoryAffinity, handle, 1, pynvml.NVML_AFFINITY_SCOPE_NODE)
    mask = 0 if affinity is None else int(affinity[0])
    if mask and mask & (mask - 1) == 0:  # several nodes: ambiguous
        return mask.bit_length() - 1
    return None if pci is None else kernel_numa_node(pci.busId)


def kernel_numa_node(pci_bus_id: str, *, root: Path = _PCI_DEVICES) -> int | None:
    """The kernel's NUMA node of a PCI device such as `00000000:C1:00.0`; None if it has none (-1) or does not exist."""
    domain, _, rest = pci_bus_id.lower().partition(":")
    with contextlib.suppress(OSError, ValueError):
        node = int((root / f"{int(domain, 16):04x}:{rest}" / "numa_node").read_text(encoding="ascii"))
        return node if node >= 0 else None
    return None


def read_process_memory(handle: Handle) -> dict[int, int]:
    """MiB by process id of every process that computes on the GPU, of any owner.

    Lacks processes whose memory the driver does not report. In a container with its own process namespace the ids are
    the host's, or missing.

    Raises:
        pynvml.NVMLError: the device is gone.
    """
    return memory_by_pid(running_processes(handle) or [])


def running_processes(handle: Handle) -> Sequence[Any] | None:
    """nvmlProcessInfo_t of every process that computes on the device; with MIG one for each instance that a process
    uses. None when the driver does not list them.

    Raises:
        pynvml.NVMLError: the device is gone.
    """
    for read in (pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2):
        processes: Sequence[Any] | None = figure_or_none(read, handle)
        if processes is not None:
            return processes
    return None


def memory_by_pid(processes: Sequence[Any]) -> dict[int, int]:
    """MiB by process id, without those of unknown size."""
    held: Counter[int] = Counter()
    for process in processes:
        if process.usedGpuMemory is not None:
            held[process.pid] += process.usedGpuMemory
    return {pid: used // MIB for pid, used in held.items()}


def read_nvlinks(handle: Handle) -> NvLinks:
    """The active NVLinks of a GPU by where they end.

    Raises:
        pynvml.NVMLError: the device is gone.
    """
    switch = 0
    peers: Counter[str] = Counter()
    for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
        active = figure_or_none(pynvml.nvmlDeviceGetNvLinkState, handle, number)
        if active != pynvml.NVML_FEATURE_ENABLED:
            continue
        kind = figure_or_none(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, number)
        remote = figure_or_none(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number)
        if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            switch += 1
        elif remote is not None:
            peers[remote.busId] += 1
    return NvLinks(to_switch=switch, to_peer=peers)


def read_ancestor(first: Handle, second: Handle) -> int | None:
    """NVML's topology level of two GPUs, None when the driver reports none."""
    level: int | None = figure_or_none(pynvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
    return level


def refuses_nvlink(first: Handle, second: Handle) -> bool:
    """True when the driver says that two GPUs cannot reach each other over NVLink; False when it does not answer."""
    status = figure_or_none(pynvml.nvmlDeviceGetP2PStatus, first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    return bool(status is not None and status != pynvml.NVML_P2P_STATUS_OK)
