"""`[[accelerators]]` and `[simulate]` of neuron.toml: devices that no driver lists."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.settings import SettingsModel


class AcceleratorEntry(SettingsModel):
    """An entry of `[[accelerators]]`: equal devices of which neuron knows only what is written here."""

    name: str = Field(min_length=1)
    """Shown to people."""
    memory_mb: int = Field(gt=0)
    """MiB of each that engines may have."""
    count: int = Field(default=1, ge=1, le=64)
    """How many there are, at most 64."""
    variable: str | None = Field(default=None, pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Environment variable in which an engine gets the indices of its own, with commas; the same in all entries.
    Default: the engine is told nothing."""


class SimulatedDevice(SettingsModel):
    """A simulated device; missing values come from the preset `name`, if there is one, or for a MIG instance from its
    GPU."""

    index: int | None = Field(default=None, ge=0)
    """Its place in the list, from 0, or a MIG instance's [index](hardware.md#mig); another number is an error. Default:
    its place."""
    kind: Literal["gpu", "mig"] = "gpu"
    """`"gpu"`, or `"mig"` for a MIG instance."""
    parent: int | None = Field(default=None, ge=0)
    """The index of a MIG instance's GPU. Default: required for a MIG instance."""
    profile: str | None = None
    """A MIG instance's profile; its memory follows from it. Default: none."""
    vendor: Literal["nvidia", "amd", "unknown"] = "nvidia"
    """`"nvidia"`, `"amd"` or `"unknown"`."""
    name: str = "Simulated GPU"
    """Its name, or a preset's."""
    vram_total_mb: int | None = Field(default=None, gt=0)
    """Its memory in MiB. Default: the preset's; required without a preset."""
    compute_capability: str | None = None
    """For example `"8.9"`. Default: the preset's, otherwise `"8.0"`; none for another vendor."""
    uuid: str | None = None
    """Its UUID. Default: derived from host and index, the same after every restart."""
    pci_bus_id: str | None = None
    """Its PCI address. Default: derived from the index."""
    numa_node: int | None = None
    """Its NUMA node. Default: 0."""
    unified: bool | None = None
    """True: it has no memory of its own and shares the host's RAM. Default: as the preset, otherwise `false`."""


class SimulateSettings(SettingsModel):
    """`[simulate]`: when present, it replaces the topology that NVML reports."""

    devices: list[str | SimulatedDevice] = Field(default_factory=list)
    """Presets by name, or tables of `[[simulate.devices]]`, in the order of their indices. Default: none: a host
    without GPUs."""
    nvlink: bool = False
    """True: all devices are NVLink peers; false: they share a PCIe host bridge."""
    ram_mb: int | None = Field(default=None, gt=0)
    """MiB of host memory for models on the CPU and sleeping engines, `ram_reserve_mb` included. Default: that of a
    unified device; without one it is not counted."""
    cores: int | None = Field(default=None, ge=1, le=4096)
    """How many cores engines on the CPU share. Default: those of this machine."""
