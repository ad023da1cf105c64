"""AMD GPUs through amdsmi, AMD's Python package over libamd_smi.so."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from neuron.gpu.sources.driver_source import DriverSource, Handle
from neuron.gpu.topology import Topology
from shared.protocol import Device, DeviceHealth, Link, LinkKind
from shared.protocol.topology import AMD

log = logging.getLogger(__name__)

MIB = 1024 * 1024
_NO_NUMA_NODE = 0xFFFFFFFF
_ENERGY_KEYS = ("energy_accumulator", "power")  # the second before ROCm 6.3
_UJ_PER_WH = 3.6e9
_POWER_KEYS = ("socket_power", "current_socket_power", "average_socket_power")  # which exists depends on the GPU


class AmdTopologySource(DriverSource):
    """`neuron.gpu.topology.TopologySource` of AMD's GPUs. A device's index is its number for HIP.

    Without the package or its library there are no devices; with an unusable driver there are none, and a reason. A GPU
    that does not report its memory is lost until it does again.
    """

    def __init__(self) -> None:
        super().__init__("amdsmi")
        self._smi: Any = None
        self._topology: Topology | None = None

    def _look_up(self) -> Topology:
        if self._topology is None:
            self._topology = self._read_topology()
        return self._topology

    def _read_topology(self) -> Topology:
        smi = _library()
        if smi is None:
            return Topology()
        # An older package or library lacks functions, and some figures do not read as text or numbers.
        self._errors = (smi.AmdSmiException, AttributeError, KeyError, ValueError)
        try:
            smi.amdsmi_init()
            self._smi = smi
            found = list(smi.amdsmi_get_processor_handles())
        except self._errors as error:
            reason = f"AMD SMI: {_text(error)}: look at `amd-smi list` and `dmesg`, then restart neuron"
            log.warning("no AMD GPU can be used: %s", reason)
            return Topology(cuda_unavailable_reason=reason)
        self._handles = dict(sorted(zip(self._indices(found), found, strict=True)))
        devices = tuple(self._read_device(index, handle) for index, handle in self._handles.items())
        driver = self._optional("amdsmi_get_gpu_driver_info", found[0]) if found else None
        return Topology(
            devices=devices,
            links=tuple(self._links(devices)),
            driver_version=None if driver is None else _known(driver.get("driver_version")),
        )

    def _indices(self, handles: Sequence[Handle]) -> list[int]:
        """HIP's numbers; the order in which amdsmi lists the GPUs if it does not say them."""
        told = [(self._optional("amdsmi_get_gpu_enumeration_info", each) or {}).get("hip_id") for each in handles]
        numbers = [each for each in told if isinstance(each, int)]
        return numbers if len(set(numbers)) == len(handles) else list(range(len(handles)))

    def _read_device(self, index: int, handle: Handle) -> Device:
        asic = self._optional("amdsmi_get_gpu_asic_info", handle) or {}
        numa = self._optional("amdsmi_topo_get_numa_node_number", handle)
        total = 0
        try:
            total = self._memory(handle)[0]
        except self._errors as error:
            self._mark_lost(index, error)
        return Device(
            index=index,
            vendor=AMD,
            name=_known(asic.get("market_name")) or "",
            vram_total_mb=total // MIB,
            uuid=self._optional("amdsmi_get_gpu_device_uuid", handle) or None,
            pci_bus_id=self._optional("amdsmi_get_gpu_device_bdf", handle),
            numa_node=None if numa == _NO_NUMA_NODE else numa,
            lost=self._lost.get(index),
        )

    def _links(self, devices: Sequence[Device]) -> Iterator[Link]:
        # Older packages have another class, with XGMI and PCIEXPRESS.
        types: Any = getattr(self._smi, "AmdSmiLinkType", None) or getattr(self._smi, "AmdSmiIoLinkType", ())
        names = {each.value: each.name for each in types}
        for first, second in combinations(devices, 2):
            a, b = self._handles[first.index], self._handles[second.index]
            path = self._optional("amdsmi_topo_get_link_type", a, b) or {}
            kind, name = None, names.get(path.get("type"), "")
            if "XGMI" in name:
                kind = LinkKind.XGMI if path.get("hops") == 1 else None
            elif "PCIE" in name:
                kind = LinkKind.NODE if first.numa_node == second.numa_node else LinkKind.SYS
            if kind is not None:
                yield Link(a=first.index, b=second.index, kind=kind)

    def _health_of(self, index: int, handle: Handle) -> DeviceHealth:
        total, used = self._memory(handle)
        activity = self._optional("amdsmi_get_gpu_activity", handle) or {}
        return DeviceHealth(
            index=index,
            vram_used_mb=used // MIB,
            vram_free_mb=max(0, total - used) // MIB,
            utilization_pct=_number(activity.get("gfx_activity")),
            temp_c=self._temperature(handle),
            power_w=self._power(handle),
            energy_wh=self._energy(handle),
        )

    def _memory(self, handle: Handle) -> tuple[int, int]:
        """(total, used) in bytes. Raises one of `_errors` if the GPU does not report them."""
        kind = self._smi.AmdSmiMemoryType.VRAM
        return (
            int(self._smi.amdsmi_get_gpu_memory_total(handle, kind)),
            int(self._smi.amdsmi_get_gpu_memory_usage(handle, kind)),
        )

    def _temperature(self, handle: Handle) -> float | None:
        """Degrees Celsius of the edge sensor, or of the hottest spot: MI300 has no edge sensor."""
        current = self._smi.AmdSmiTemperatureMetric.CURRENT
        for sensor in (self._smi.AmdSmiTemperatureType.EDGE, self._smi.AmdSmiTemperatureType.HOTSPOT):
            degrees = _number(self._optional("amdsmi_get_temp_metric", handle, sensor, current))
            if degrees:
                return degrees
        return None

    def _power(self, handle: Handle) -> float | None:
        power = self._optional("amdsmi_get_power_info", handle) or {}
        watts = (_number(power.get(key)) for key in _POWER_KEYS)
        return next((each for each in watts if each), None)

    def _energy(self, handle: Handle) -> float | None:
        """Wh since the driver was loaded: a count of units of so many microjoules."""
        counter = self._optional("amdsmi_get_energy_count", handle) or {}
        counted = next((found for key in _ENERGY_KEYS if (found := _number(counter.get(key)))), None)
        resolution = _number(counter.get("counter_resolution"))
        return None if counted is None or not resolution else counted * resolution / _UJ_PER_WH

    def _read_process_memory(self) -> dict[int, dict[int, int]]:
        self._look_up()
        return self._read_devices(lambda _, handle: self._processes(handle))

    def _processes(self, handle: Handle) -> dict[int, int]:
        """MiB by process id, without those of unknown size."""
        listed = self._optional("amdsmi_get_gpu_process_list", handle) or []
        held = {each["pid"]: _number(each["memory_usage"]["vram_mem"]) for each in listed}
        return {pid: int(used) // MIB for pid, used in held.items() if used is not None}

    def _lost_reason(self, error: Exception) -> str:
        return f"AMD SMI: {_text(error)}: look at `amd-smi` and `dmesg`"

    def _optional(self, function: str, *arguments: Any) -> Any:
        """The result of one of amdsmi's functions; None when it returns an error or does not exist."""
        try:
            return getattr(self._smi, function)(*arguments)
        except self._errors:
            return None

    def _shut_down(self) -> None:
        if self._smi is not None:
            self._handles.clear()
            self._optional("amdsmi_shut_down")
            self._smi = None


def _library() -> Any:
    """The package amdsmi; None without it, or without its library, which it reports on standard output."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return importlib.import_module("amdsmi")
    except ModuleNotFoundError:
        return None
    except (ImportError, KeyError, AttributeError, OSError) as error:
        told = said.getvalue().partition("\n")[0] or repr(error)
        log.info("the package amdsmi cannot be used: %s", told)
        return None


def _known(value: Any) -> str | None:
    """A text that amdsmi knows; it says "N/A" for others."""
    return value if isinstance(value, str) and value not in ("", "N/A") else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _text(error: Exception) -> str:
    """One line, such as "AMDSMI_STATUS_NO_PERM - Permission Denied"."""
    return str(getattr(error, "err_info", None) or repr(error))
