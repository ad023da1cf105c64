"""GPU facts of this host through nvidia-ml-py.

NVML blocks (a call to a broken GPU may take seconds), so all calls run in one dedicated thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

import pynvml

from neuron.gpu import nvml_device
from neuron.gpu.links import LinkFacts, Pair, links_between
from neuron.gpu.nvml_condition import ConditionTracker
from neuron.gpu.nvml_device import Handle
from neuron.gpu.nvml_errors import lost_reason, means_gone, unavailable_reason
from neuron.gpu.topology import Topology
from shared.protocol import Device, DeviceHealth

log = logging.getLogger(__name__)

Result = TypeVar("Result")

CLOSE_TIMEOUT_SECS = 5.0  # a driver that hangs must not prevent an orderly exit


class NvmlTopologySource:
    """`neuron.gpu.topology.TopologySource` of the real GPUs.

    Without an NVIDIA library there are no devices; with an unusable driver there are none, and a reason. An unusable
    GPU is a device with `lost` set, and does not affect the others. A GPU lost later keeps its facts, gets `lost`, and
    is missing in `health` until it answers again.

    The topology does not change while the process lives: after a driver is repaired, neuron must be restarted, as the
    reasons say.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nvml")
        # Only that thread uses the attributes below.
        self._topology: Topology | None = None
        self._handles: dict[int, Handle] = {}
        self._lost: dict[int, str] = {}
        self._conditions = ConditionTracker()
        self._initialised = False

    async def discover(self) -> Topology:
        return await self._call(self._discover)

    async def health(self) -> Sequence[DeviceHealth]:
        return await self._call(self._read_health)

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        return await self._call(self._read_process_memory)

    async def close(self) -> None:
        """Shuts NVML down, unless the driver hangs. May be called again."""
        with contextlib.suppress(asyncio.TimeoutError, RuntimeError):  # RuntimeError: already closed
            await asyncio.wait_for(self._call(self._shut_down), CLOSE_TIMEOUT_SECS)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _call(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _discover(self) -> Topology:
        if self._topology is None:
            self._topology = self._read_topology()
        devices = tuple(
            device.model_copy(update={"lost": self._lost.get(device.index)}) for device in self._topology.devices
        )
        return replace(self._topology, devices=devices)

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

    def _read_health(self) -> list[DeviceHealth]:
        self._discover()
        self._conditions.take_events()
        figures = self._read_devices(self._health_of)
        for index in figures:
            if self._lost.pop(index, None) is not None:
                log.warning("GPU %d answers again", index)
        return list(figures.values())

    def _health_of(self, index: int, handle: Handle) -> DeviceHealth:
        health = nvml_device.read_health(index, handle)
        self._conditions.read(index, handle)
        return self._conditions.added_to(health, index)

    def _read_process_memory(self) -> dict[int, dict[int, int]]:
        self._discover()
        return self._read_devices(lambda _, handle: nvml_device.read_process_memory(handle))

    def _read_devices(self, read: Callable[[int, Handle], Result]) -> dict[int, Result]:
        """`read` of each device that answers, by index. Marks the others as lost."""
        results = {}
        for index, handle in self._handles.items():
            try:
                results[index] = read(index, handle)
            except pynvml.NVMLError as error:
                self._mark_lost(index, error)
        return results

    def _mark_lost(self, index: int, error: pynvml.NVMLError) -> None:
        reason = lost_reason(error)
        if self._lost.get(index) != reason:
            log.error("GPU %d cannot be used: %s", index, reason)
        self._lost[index] = reason
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
