"""`[[accelerators]]` and `[simulate]` of neuron.toml: devices that no driver lists."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.settings import SettingsModel


class AcceleratorEntry(SettingsModel):
    """An entry of `[[accelerators]]`: equal devices of which neuron knows only what is written here."""

    name: str = Field(min_length=1)
    memory_mb: int = Field(gt=0)  # of each, for engines
    count: int = Field(default=1, ge=1, le=64)
    variable: str | None = Field(default=None, pattern=r"^[A-Z_][A-Z0-9_]*$")  # gets an engine's indices; None: nothing


class SimulatedDevice(SettingsModel):
    """A simulated device; missing values come from the preset `name`, if there is one, or for a MIG instance from its
    GPU."""

    index: int | None = Field(default=None, ge=0)  # optional; its position in the list, or that of a MIG instance
    kind: Literal["gpu", "mig"] = "gpu"
    parent: int | None = Field(default=None, ge=0)  # a MIG instance's GPU, by index
    profile: str | None = None  # of a MIG instance, such as "1g.10gb"
    vendor: Literal["nvidia", "amd", "unknown"] = "nvidia"
    name: str = "Simulated GPU"
    vram_total_mb: int | None = Field(default=None, gt=0)
    compute_capability: str | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    unified: bool | None = None  # True: it shares the host's RAM


class SimulateSettings(SettingsModel):
    """`[simulate]`: when present, it replaces the topology that NVML reports."""

    devices: list[str | SimulatedDevice] = Field(default_factory=list)
    nvlink: bool = False  # True: all devices are NVLink peers; False: they share a PCIe host bridge
    ram_mb: int | None = Field(default=None, gt=0)  # of the host; None: not counted
    cores: int | None = Field(default=None, ge=1, le=4096)  # None: those of this machine
