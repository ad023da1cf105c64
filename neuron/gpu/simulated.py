"""Simulated GPUs: facts from `[simulate]`, used memory from what simulated engines record."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from neuron.config import SimulatedDevice, SimulateSettings
from neuron.gpu import simulated_vram as vram
from neuron.gpu.topology import MIG_MARK, DeviceReading, Topology, mig_index
from shared.gpus import PRESETS, find_preset
from shared.protocol import Device, DeviceHealth, Link, LinkKind
from shared.protocol.topology import AMD, MIG_KIND, NVIDIA
from shared.settings import SettingsError

DRIVER_VERSION = "580.95.05"
CUDA_VERSION = "13.0"
NVLINKS = 4  # between each pair, with `nvlink = true`
DEFAULT_COMPUTE_CAPABILITY = "8.0"  # of a device without one and without a preset

MIB_PER_PROFILE_GB = 985  # of a MIG instance: drivers report about 9,850 MiB for 1g.10gb

IDLE_TEMP_C = 34.0
IDLE_POWER_W = 18.0
RESIDENT_POWER_W = 60.0  # with an engine's memory on it: the clocks stay up
FULL_POWER_W = 350.0
_HALF_LOAD_REQUESTS = 4.0  # so many use half of what is between the last two

_UUID_NAMESPACE = uuid.UUID("5d7c1b0e-0f5b-5a53-9a54-6e6575726f6e")


def no_requests(_: int) -> int:
    """Nothing runs on any device."""
    return 0


class SimulatedTopologySource:
    """`neuron.gpu.topology.TopologySource` of a simulated host.

    `vram_dir` is where this host's simulated engines record what they hold (`neuron.gpu.simulated_vram`); optional.
    `name` (the neuron's) makes device uuids that are stable over restarts and differ between hosts. `requests_on` says
    how many requests run on the device with an index.

    Raises:
        SettingsError: a device has neither a preset nor a memory size, or two devices have the same uuid.
    """

    def __init__(
        self,
        settings: SimulateSettings,
        vram_dir: Path,
        *,
        name: str = "",
        requests_on: Callable[[int], int] = no_requests,
    ) -> None:
        self._vram_dir = vram_dir
        self._requests_on = requests_on
        devices = resolve_devices(settings, host=name)
        self._topology = Topology(
            devices=devices,
            links=links_of(devices, nvlink=settings.nvlink),
            driver_version=DRIVER_VERSION,
            cuda_version=CUDA_VERSION,
            simulated=True,
        )

    async def discover(self) -> Topology:
        return self._topology

    async def read(self) -> DeviceReading:
        used = await asyncio.to_thread(vram.used_mb, self._vram_dir)
        conditions = await asyncio.to_thread(vram.conditions, self._vram_dir)
        health = [
            _with_condition(health_of(device, used[device.uuid or ""], self._requests(device)), device, conditions)
            for device in self._topology.devices
        ]
        return DeviceReading(self._topology, health)

    def _requests(self, device: Device) -> int:
        """On the device, and on its MIG instances."""
        slices = [each.index for each in self._topology.devices if each.parent == device.index]
        return sum(map(self._requests_on, [device.index, *slices]))

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        usage = await asyncio.to_thread(vram.usage_by_process, self._vram_dir)
        return {
            device.index: {pid: held[device.uuid] for pid, held in usage.items() if device.uuid in held}
            for device in self._topology.devices
        }

    async def close(self) -> None:
        """Does nothing."""


def _with_condition(
    health: DeviceHealth, device: Device, conditions: Mapping[str, vram.SimulatedCondition]
) -> DeviceHealth:
    found = conditions.get(str(device.index)) or conditions.get(device.uuid or "")
    if found is None:
        return health
    told = {"fault": found.fault, "warnings": list(found.warnings), "xids": dict(found.xids)}
    return health.model_copy(update=told)


def health_of(device: Device, used_mb: int, requests: int = 0) -> DeviceHealth:
    """A GPU with `used_mb` MiB used, at most its total, that computes for so many requests. A MIG instance has no
    power of its own."""
    used = min(used_mb, device.vram_total_mb)
    power = RESIDENT_POWER_W if used or requests else IDLE_POWER_W
    power += (FULL_POWER_W - RESIDENT_POWER_W) * requests / (requests + _HALF_LOAD_REQUESTS)
    return DeviceHealth(
        index=device.index,
        vram_used_mb=used,
        vram_free_mb=device.vram_total_mb - used,
        utilization_pct=100 if requests else 0,
        temp_c=IDLE_TEMP_C,
        power_w=None if device.is_mig_instance else round(power, 1),
    )


def links_of(devices: Sequence[Device], *, nvlink: bool) -> tuple[Link, ...]:
    """Equal links for all pairs of GPUs: NVLink or XGMI, or one PCIe host bridge."""
    gpus = [device for device in devices if not device.is_mig_instance]
    kind, count = (LinkKind.NVLINK, NVLINKS) if nvlink else (LinkKind.PHB, 0)
    if nvlink and all(device.vendor == AMD for device in gpus):
        kind, count = LinkKind.XGMI, 0
    pairs = combinations([device.index for device in gpus], 2)
    return tuple(Link(a=a, b=b, kind=kind, nvlinks=count) for a, b in pairs)


def resolve_devices(settings: SimulateSettings, *, host: str) -> tuple[Device, ...]:
    """`[simulate] devices` as devices: GPUs numbered in the order written, then MIG instances.

    Raises:
        SettingsError: with one line for each problem.
    """
    devices: list[Device] = []
    problems: list[str] = []
    for place, entry in enumerate(settings.devices):
        try:
            if isinstance(entry, SimulatedDevice) and entry.kind == MIG_KIND:
                devices.append(_resolve_mig_instance(entry, f"simulate.devices[{place}]", devices, host=host))
            elif devices and devices[-1].is_mig_instance:
                raise SettingsError([f"simulate.devices[{place}]: GPUs come before MIG instances"])
            else:
                devices.append(resolve_device(entry, index=place, host=host))
        except SettingsError as error:
            problems += error.problems
    uuids = [device.uuid for device in devices]
    problems += [
        f"simulate.devices[{place}].uuid = {device.uuid!r}: another device has the same uuid"
        for place, device in enumerate(devices)
        if device.uuid in uuids[:place]
    ]
    if problems:
        raise SettingsError(problems)
    split = {device.parent for device in devices}
    return tuple(
        device.model_copy(update={"mig_mode": True}) if device.index in split else device for device in devices
    )


def _resolve_mig_instance(table: SimulatedDevice, key: str, before: Sequence[Device], *, host: str) -> Device:
    """One MIG instance of a GPU `before` it; it gets the next of that GPU's indices.

    Raises:
        SettingsError: names the key.
    """
    gpu = next((each for each in before if each.index == table.parent and not each.is_mig_instance), None)
    if gpu is None or gpu.vendor != NVIDIA:
        raise SettingsError([f"{key}.parent = {table.parent}: must be the index of an NVIDIA GPU before it"])
    index = mig_index(gpu.index, 1 + sum(each.parent == gpu.index for each in before))
    if table.index not in (None, index):
        raise SettingsError([f"{key}.index = {table.index}: must be {index}, as it is numbered by its GPU"])
    size = re.search(r"\.(\d+)gb$", table.profile or "")
    total = table.vram_total_mb or (MIB_PER_PROFILE_GB * int(size[1]) if size else None)
    if total is None:
        raise SettingsError([f'{key}: must have vram_total_mb, or a profile such as "1g.10gb"'])
    return Device(
        index=index,
        kind=MIG_KIND,
        parent=gpu.index,
        profile=table.profile,
        name=table.name if "name" in table.model_fields_set else f"{gpu.name}{MIG_MARK}{table.profile or ''}".strip(),
        vram_total_mb=total,
        compute_capability=gpu.compute_capability,
        uuid=table.uuid or f"MIG-{uuid.uuid5(_UUID_NAMESPACE, f'{host}/{index}')}",
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
    )


def resolve_device(entry: str | SimulatedDevice, *, index: int, host: str) -> Device:
    """One entry of `[simulate] devices`; missing values come from the preset of its name.

    Raises:
        SettingsError: names the value and the available presets.
    """
    table = SimulatedDevice(name=entry) if isinstance(entry, str) else entry
    if table.index not in (None, index):
        raise SettingsError([f"simulate.devices[{index}].index = {table.index}: devices are numbered as written"])
    preset = find_preset(table.name)
    total = table.vram_total_mb or (preset.vram_total_mb if preset else None)
    if total is None:
        known = ", ".join(each.name for each in PRESETS)
        key = f"simulate.devices[{index}]" if isinstance(entry, str) else f"simulate.devices[{index}].name"
        raise SettingsError(
            [f"{key} = {table.name!r}: no such preset: write {{ name = …, vram_total_mb = … }}, or use one of {known}"]
        )
    usual = DEFAULT_COMPUTE_CAPABILITY if table.vendor == NVIDIA else None
    capability = table.compute_capability or (preset.compute_capability if preset else usual)
    return Device(
        index=index,
        vendor=table.vendor,
        name=preset.name if preset and isinstance(entry, str) else table.name,
        vram_total_mb=total,
        compute_capability=capability,
        uuid=table.uuid or f"GPU-{uuid.uuid5(_UUID_NAMESPACE, f'{host}/{index}')}",
        pci_bus_id=table.pci_bus_id or f"00000000:{index + 1:02X}:00.0",
        numa_node=table.numa_node if table.numa_node is not None else 0,
        unified=table.unified if table.unified is not None else bool(preset and preset.unified),
    )
