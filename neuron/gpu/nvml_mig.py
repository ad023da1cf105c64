"""Reads the MIG instances of one GPU through nvidia-ml-py. Every function blocks, as those of `neuron.gpu.nvml_device`.

An engine gets a compute instance by its UUID, and the memory belongs to the GPU instance around it. The compute
instances of one GPU instance therefore share a memory, and only the first of them is a device.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pynvml

from neuron.gpu.nvml_device import MIB, Handle, figure_or_none, memory_by_pid, read_memory, running_processes
from neuron.gpu.topology import MIG_MARK, mig_index
from shared.protocol import Device
from shared.protocol.topology import MIG_KIND


@dataclass(frozen=True)
class MigInstance:
    """One compute instance: the ids of its GPU instance and its own, its UUID ("MIG-…"), and NVML's handle."""

    gpu_instance: int
    compute_instance: int
    uuid: str
    handle: Handle = field(compare=False)


def read_mode_if_any(handle: Handle) -> bool | None:
    """As `read_mode`; None when the GPU has no MIG mode.

    Raises:
        pynvml.NVMLError: the GPU is gone.
    """
    return figure_or_none(read_mode, handle)


def read_mode(handle: Handle) -> bool:
    """True when the GPU is in MIG mode.

    Raises:
        pynvml.NVMLError: the GPU is gone, has no MIG mode or does not answer.
    """
    current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def read_instances(handle: Handle) -> tuple[MigInstance, ...]:
    """The compute instances of a GPU in MIG mode, by their ids.

    Raises:
        pynvml.NVMLError: the GPU is gone or does not answer.
    """
    found = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):  # none has this number
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            found.append(
                MigInstance(
                    gpu_instance=pynvml.nvmlDeviceGetGpuInstanceId(instance),
                    compute_instance=pynvml.nvmlDeviceGetComputeInstanceId(instance),
                    uuid=pynvml.nvmlDeviceGetUUID(instance),
                    handle=instance,
                )
            )
    return tuple(sorted(found, key=lambda each: (each.gpu_instance, each.compute_instance)))


def first_of_each(instances: tuple[MigInstance, ...]) -> list[MigInstance]:
    """The first compute instance of each GPU instance."""
    first: dict[int, MigInstance] = {}
    for instance in instances:
        first.setdefault(instance.gpu_instance, instance)
    return list(first.values())


def read_device(gpu: Device, instance: MigInstance) -> Device:
    """The facts of one MIG instance; those that it lacks are the GPU's.

    Raises:
        pynvml.NVMLError: the GPU is gone, or does not report the instance's memory.
    """
    total, _, _ = read_memory(instance.handle)
    name = figure_or_none(pynvml.nvmlDeviceGetName, instance.handle) or gpu.name
    card, _, profile = name.partition(MIG_MARK)
    profile = profile or _profile(instance.handle)
    return Device(
        index=mig_index(gpu.index, instance.gpu_instance),
        kind=MIG_KIND,
        parent=gpu.index,
        profile=profile or None,
        name=f"{card}{MIG_MARK}{profile}".strip(),
        uuid=instance.uuid,
        vram_total_mb=total // MIB,
        compute_capability=gpu.compute_capability,
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
    )


def _profile(handle: Handle) -> str:
    """Such as "1g.10gb", from the instance's attributes: drivers before 470 do not name it. Empty if unknown."""
    attributes: Any = figure_or_none(pynvml.nvmlDeviceGetAttributes_v2, handle)
    if attributes is None:
        return ""
    slices = attributes.gpuInstanceSliceCount
    return f"{slices}g.{-(-attributes.memorySizeMB // 1024)}gb"


def read_process_memory(handle: Handle, gpu: Handle, gpu_instance: int) -> dict[int, int]:
    """MiB by process id of every process in the GPU instance with this handle and id. Asks the instance, or else the
    GPU, which lists the processes of all its instances only to a privileged caller.

    Raises:
        pynvml.NVMLError: the GPU is gone.
    """
    processes = running_processes(handle)
    if processes is None:
        everywhere = running_processes(gpu) or []
        processes = [each for each in everywhere if each.gpuInstanceId == gpu_instance]
    return memory_by_pid(processes)
