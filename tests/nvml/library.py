"""Builds the tests' libnvidia-ml.so.1 and writes the hardware it shows; see nvml.c for the file's keys."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml.c")
REPOSITORY = Path(__file__).parents[2]
MIB = 1024 * 1024

NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
VERSION_MISMATCH = 18
UNKNOWN = 999

SINGLE_SWITCH, HOST_BRIDGE = 10, 30


def build_library(directory: Path, *, old_driver: bool = False) -> dict[str, str]:
    """Compiles the library into `directory` unless it exists. Returns the environment with which a child finds it.

    With `old_driver`, functions that drivers before 510 lack are really absent. Skips the test without a C compiler.
    """
    library = directory / ("old" if old_driver else "new") / "libnvidia-ml.so.1"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            pytest.skip("no C compiler: the NVML test library cannot be built (Debian: gcc and libc6-dev)")
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        options = ["-DOLD_DRIVER"] if old_driver else []
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *options, "-o", str(unfinished), str(SOURCE)],
            check=True,
        )
        unfinished.replace(library)
    others = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{library.parent}:{others}" if others else str(library.parent)}


@dataclass(frozen=True)
class Slice:
    """One MIG device of a GPU: its GPU instance and compute instance. `figures` as of `Gpu`."""

    gpu_instance: int
    profile: str = "1g.10gb"
    total_mib: int = 9856
    used_mib: int = 0
    compute_instance: int = 0
    processes: tuple[tuple[int, int | None], ...] = ()
    figures: Mapping[str, object] = field(default_factory=dict)

    def keys(self, name: str, gpu: int) -> dict[str, object]:
        return {
            "gi": self.gpu_instance,
            "ci": self.compute_instance,
            "name": f"{name} MIG {self.profile}",
            "uuid": mig_uuid_of(gpu, self.gpu_instance, self.compute_instance),
            "slices": self.profile[0],
            "total": self.total_mib * MIB,
            "reserved": 0,
            "used": self.used_mib * MIB,
            **_process_keys(self.processes),
            **self.figures,
        }


def _process_keys(processes: tuple[tuple[int, int | None], ...]) -> dict[str, object]:
    return {
        f"process.{number}": f"{pid} {'unknown' if mib is None else mib * MIB}"
        for number, (pid, mib) in enumerate(processes)
    }


@dataclass(frozen=True)
class Gpu:
    """One GPU of a scenario, in MIG mode if it has `slices`; `figures` are further keys; `None` removes one."""

    name: str = "NVIDIA GeForce RTX 5090"
    total_mib: int = 32607
    used_mib: int = 0
    compute_capability: str = "12.0"
    nvlinks: tuple[str, ...] = ()  # PCI bus id of the peer, "switch" or "off"
    processes: tuple[tuple[int, int | None], ...] = ()  # (pid, MiB or unknown)
    slices: tuple[Slice, ...] = ()
    figures: Mapping[str, object] = field(default_factory=dict)

    def keys(self, index: int) -> dict[str, object]:
        keys: dict[str, object] = {
            "name": self.name,
            "uuid": uuid_of(index),
            "pci_bus_id": pci_bus_id_of(index),
            "compute_capability": self.compute_capability,
            "numa_node": 0,
            "total": self.total_mib * MIB,
            "reserved": 512 * MIB,
            "used": self.used_mib * MIB,
            "temp_c": 41 + index,
            "utilization_pct": 7,
            "power_mw": 65_500,
        }
        keys |= {f"nvlink.{number}": end for number, end in enumerate(self.nvlinks)}
        keys |= _process_keys(self.processes)
        if self.slices:
            keys["mig"] = 1
        for number, each in enumerate(self.slices):
            keys |= {f"mig{number}.{key}": value for key, value in each.keys(self.name, index).items()}
        return keys | dict(self.figures)


def uuid_of(index: int) -> str:
    return f"GPU-00000000-0000-4000-8000-{index:012d}"


def mig_uuid_of(gpu: int, gpu_instance: int, compute_instance: int = 0) -> str:
    return f"MIG-00000000-0000-5000-8000-{gpu:04d}{gpu_instance:04d}{compute_instance:04d}"


def pci_bus_id_of(index: int) -> str:
    return f"00000000:{0xC1 + index:02X}:00.0"


def write_scenario(path: Path, gpus: tuple[Gpu, ...] = (), **keys: object) -> dict[str, str]:
    """Replaces the hardware atomically, for running processes too. Returns the environment that names it.

    `keys` are further keys of nvml.c, with `__` for a dot (`topology__0__1=10`).
    """
    lines: dict[str, object] = {"driver": "580.95.05", "cuda": 13000, "count": len(gpus)}
    for index, gpu in enumerate(gpus):
        lines |= {f"gpu{index}.{key}": value for key, value in gpu.keys(index).items()}
    lines |= {key.replace("__", "."): value for key, value in keys.items()}
    unfinished = path.with_suffix(".new")
    unfinished.write_text(
        "".join(f"{key} {value}\n" for key, value in lines.items() if value is not None), encoding="utf-8"
    )
    unfinished.replace(path)
    return {"FAKE_NVML_FILE": str(path)}


# Hardware for `write_scenario`; () is a driver without a GPU.
NVLINKED_PAIR = (
    Gpu(nvlinks=(pci_bus_id_of(1),) * 4),
    Gpu(nvlinks=(pci_bus_id_of(0),) * 4),
)
LONE_4090 = (Gpu(name="NVIDIA GeForce RTX 4090", total_mib=24564, used_mib=512, compute_capability="8.9"),)
A100_SLICED = Gpu(
    name="NVIDIA A100-SXM4-80GB",
    total_mib=81920,
    compute_capability="8.0",
    slices=(Slice(9), Slice(10), Slice(2, "3g.40gb", 40192)),
)
ONE_LOST = (Gpu(), Gpu(figures={"handle_error": GPU_IS_LOST}))
