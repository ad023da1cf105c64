"""GPU figures that cortex and neuron both use: what an engine takes by default, and the models that a simulation can
name. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DEFAULT_ENGINE_SHARE: Final = 0.92
"""Fraction of each device that vLLM takes by default (`--gpu-memory-utilization` of 0.32), and must find free to start.
The rest is for the driver and for errors of an estimate."""
DEVICE_MARGIN_MB: Final = 512
"""MiB that neuron leaves unbooked on every real device: an engine's CUDA context, which vLLM does not count into its
fraction, and the few MiB by which NVML and CUDA disagree. Simulated devices have neither."""

_RAM_RESERVE_MB: Final = 4096
_RAM_RESERVE_PART: Final = 8

MEMORY_STEP_MB: Final = 1024
"""Free memory counts in whole GiB when sets of devices are compared, so that the few MiB by which two idle cards differ
do not decide."""


@dataclass(frozen=True)
class GpuPreset:
    """One GPU model. `aliases` are other spellings, such as NVML's name. `unified`: it shares the host's RAM, which is
    that large."""

    name: str
    vram_total_mb: int
    compute_capability: str
    aliases: tuple[str, ...] = ()
    unified: bool = False


PRESETS = (
    GpuPreset("RTX 5090", 32607, "12.0"),
    GpuPreset("RTX 5080", 16303, "12.0"),
    GpuPreset("RTX 5070 Ti", 16303, "12.0"),
    GpuPreset("RTX 4090", 24564, "8.9"),
    GpuPreset("RTX 4080", 16376, "8.9"),
    GpuPreset("RTX 3090", 24576, "8.6"),
    GpuPreset("RTX 3060", 12288, "8.6"),
    GpuPreset("RTX A6000", 49140, "8.6", ("A6000",)),
    GpuPreset("L4", 23034, "8.9"),
    GpuPreset("L40S", 46068, "8.9"),
    GpuPreset("A100 80GB", 81920, "8.0", ("A100", "A100-SXM4-80GB")),
    GpuPreset("H100", 81559, "9.0", ("H100 80GB", "H100 80GB HBM3", "H100 SXM")),
    GpuPreset("H200", 143771, "9.0"),
    GpuPreset("B200", 183359, "10.0"),
    GpuPreset("GB10", 122570, "12.1", ("DGX Spark",), unified=True),
)
"""What `[simulate] devices` can name. Memory is `memory.total` in MiB as NVML reports it for the card with ECC in its
factory setting, slightly less than the advertised size; the compute capability is NVIDIA's."""


def find_preset(name: str) -> GpuPreset | None:
    """The preset for a spelling such as `RTX5090`, `rtx 5090` or `NVIDIA GeForce RTX 5090`; None if there is none."""
    return _BY_SPELLING.get(_spelling(name))


def _spelling(name: str) -> str:
    """Lower-case letters and digits only, without the vendor's words."""
    letters = "".join(character for character in name.lower() if character.isalnum())
    return letters.replace("nvidia", "").replace("geforce", "")


_BY_SPELLING = {_spelling(name): preset for preset in PRESETS for name in (preset.name, *preset.aliases)}


def ram_reserve_mb(total_mb: int) -> int:
    """MiB of a host's RAM that stay free for other programs by default: 4 GiB, at most an eighth."""
    return min(_RAM_RESERVE_MB, total_mb // _RAM_RESERVE_PART)


def in_memory_steps(free_mb: int, total_mb: int) -> int:
    """The free memory of a device with what is taken rounded to whole steps."""
    return total_mb - MEMORY_STEP_MB * round((total_mb - free_mb) / MEMORY_STEP_MB)
