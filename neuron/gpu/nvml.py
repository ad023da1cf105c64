"""GPU facts of this host through nvidia-ml-py.

NVML blocks (a call to a broken GPU may take seconds), so all calls run in one dedicated thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pynvml

from neuron.gpu import nvml_device, nvml_mig
from neuron.gpu.links import LinkFacts, Pair, links_between
from neuron.gpu.nvml_condition import ConditionTracker
from neuron.gpu.nvml_errors import lost_reason, means_gone, unavailable_reason
from neuron.gpu.nvml_mig import MigInstance
from neuron.gpu.sources.driver_source import DriverSource, Handle
from neuron.gpu.topology import Topology, gpu_instance_of, mig_parent
from shared.protocol import Device, DeviceHealth

log = logging.getLogger(__name__)


class NvmlTopologySource(DriverSource):
    """`neuron.gpu.topology.TopologySource` of the real GPUs.

    Without an NVIDIA library there are no devices; with an unusable driver there are none, and a reason. An unusable
    GPU is a device with `lost` set, and does not affect the others. A GPU lost later keeps its facts, gets `lost`, and
    is missing in the figures until it answers again.

    GPUs do not change while the process lives: after a driver is repaired, neuron must be restarted, as the reasons
    say. MIG modes and instances are looked up at each call.
    """

    _errors = (pynvml.NVMLError,)

    def __init__(self) -> None:
        super().__init__("nvml")
        self._topology: Topology | None = None
        self._gpus: dict[int, Device] = {}
        self._instances: dict[int, tuple[MigInstance, ...]] = {}  # of the GPUs in MIG mode
        self._slices: dict[int, tuple[Device, ...]] = {}  # of the GPUs in MIG mode
        self._conditions = ConditionTracker()
        self._initialised = False

    def _look_up(self) -> Topology:
        if self._topology is None:
            self._topology = self._read_topology()
            self._gpus = {device.index: device for device in self._topology.devices}
        self._follow_mig()
        slices = (device for devices in self._slices.values() for device in devices)
        return replace(self._topology, devices=(*self._gpus.values(), *slices))

    def _follow_mig(self) -> None:
        """Looks for changes of MIG modes and instances, which `nvidia-smi mig` makes at any time."""
        for gpu in [device for device in self._gpus.values() if device.mig_mode is not None]:
            if gpu.index not in self._handles:
                continue
            # A GPU that does not answer keeps its instances: they are lost when they are read.
            with contextlib.suppress(pynvml.NVMLError):
                mode = nvml_mig.read_mode(self._handles[gpu.index])
                found = nvml_mig.read_instances(self._handles[gpu.index]) if mode else ()
                if found != self._instances.get(gpu.index, ()):
                    self._replace_slices(gpu, found)
                self._gpus[gpu.index] = gpu.model_copy(update={"mig_mode": mode})

    def _replace_slices(self, gpu: Device, found: tuple[MigInstance, ...]) -> None:
        """Raises pynvml.NVMLError if the GPU is gone; then everything is as before."""
        first = nvml_mig.first_of_each(found)
        slices = tuple(nvml_mig.read_device(gpu, instance) for instance in first)
        for index in [index for index in self._handles if mig_parent(index) == gpu.index]:
            del self._handles[index]
            self._lost.pop(index, None)
        self._handles |= {device.index: each.handle for device, each in zip(slices, first, strict=True)}
        self._slices[gpu.index], self._instances[gpu.index] = slices, found
        names = ", ".join(f"{device.index} ({device.profile})" for device in slices) or "none"
        log.info("GPU %d: MIG instances by index: %s", gpu.index, names)
        if len(first) < len(found):
            log.warning(
                "GPU %d: %d compute instances share the memory of another one and are not used",
                gpu.index,
                len(found) - len(first),
            )

    def _read_topology(self) -> Topology:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            log.info("no NVIDIA library on this host: no GPUs")
            return Topology()
        except pynvml.NVMLError as error:
            return Topology(cuda_unavailable_reason=_log_unusable(unavailable_reason(error)))
        self._initialised = True
        driver_version = _optional(pynvml.nvmlSystemGetDriverVersion)
        cuda = _optional(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            return Topology(
                driver_version=driver_version, cuda_unavailable_reason=_log_unusable(unavailable_reason(error))
            )
        devices = tuple(self._read_device(index) for index in range(count))
        self._conditions.start(self._handles)
        return Topology(
            devices=devices,
            links=links_between([device.index for device in devices], self._link_facts(devices)),
            driver_version=driver_version,
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def _read_device(self, index: int) -> Device:
        handle = None
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            device = nvml_device.read_device(index, handle)
            device = device.model_copy(update={"mig_mode": nvml_mig.read_mode_if_any(handle)})
        except pynvml.NVMLError as error:
            self._mark_lost(index, error)
            reason = self._lost[index]
            if handle is None:  # the driver knows nothing else about it
                return Device(index=index, lost=reason)
            return nvml_device.read_lost_device(index, handle, reason)
        self._handles[index] = handle
        return device

    def _link_facts(self, devices: Sequence[Device]) -> LinkFacts:
        """The driver's facts about the paths between devices; a device lost meanwhile has none."""
        nvlinks = self._read_devices(lambda _, handle: nvml_device.read_nvlinks(handle))
        ancestors: dict[Pair, int] = {}
        refused: set[Pair] = set()
        for a, b in combinations(sorted(nvlinks), 2):
            first, second = self._handles[a], self._handles[b]
            level = _optional(nvml_device.read_ancestor, first, second)
            if level is not None:
                ancestors[a, b] = level
            if nvlinks[a].to_switch and nvlinks[b].to_switch and _optional(nvml_device.refuses_nvlink, first, second):
                refused.add((a, b))
        buses = {device.index: device.pci_bus_id for device in devices if device.pci_bus_id is not None}
        return LinkFacts(pci_bus_ids=buses, nvlinks=nvlinks, ancestors=ancestors, switch_refused=frozenset(refused))

    def _read_figures(self) -> list[DeviceHealth]:
        self._conditions.take_events()
        return super()._read_figures()

    def _health_of(self, index: int, handle: Handle) -> DeviceHealth:
        """A MIG instance is in the condition of its GPU, which is read before it."""
        health = nvml_device.read_health(index, handle)
        if index not in self._gpus:
            return self._conditions.added_to(health, mig_parent(index))
        self._conditions.read(index, handle)
        return self._conditions.added_to(health, index)

    def _read_process_memory(self) -> dict[int, dict[int, int]]:
        devices = {device.index: device for device in self._look_up().devices}
        return self._read_devices(lambda index, handle: self._processes_on(devices[index], handle))

    def _processes_on(self, device: Device, handle: Handle) -> dict[int, int]:
        """Those on a GPU in MIG mode are listed with its instances only."""
        if device.mig_mode:
            return {}
        if device.parent is None:
            return nvml_device.read_process_memory(handle)
        return nvml_mig.read_process_memory(handle, self._handles[device.parent], gpu_instance_of(device.index))

    def _lost_reason(self, error: Any) -> str:
        return lost_reason(error)

    def _mark_lost(self, index: int, error: Any) -> None:
        super()._mark_lost(index, error)
        if means_gone(error):
            self._conditions.mark_gone(index)

    def _shut_down(self) -> None:
        if self._initialised:
            self._initialised = False
            self._conditions.close()
            self._handles.clear()
            _optional(pynvml.nvmlShutdown)


def _optional(read: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call; None when the driver returns any error."""
    try:
        return read(*arguments)
    except pynvml.NVMLError:
        return None


def _log_unusable(reason: str) -> str:
    log.warning("no GPU can be used: %s", reason)
    return reason
