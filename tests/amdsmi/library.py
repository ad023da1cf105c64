"""Builds the tests' libamd_smi.so and writes the hardware it shows; see amdsmi.c for the file's keys."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("amdsmi.c")
MIB = 1024 * 1024

NOT_SUPPORTED = 2
API_FAILED = 7
DRIVER_NOT_LOADED = 34

PCIE, XGMI = 1, 2


def build_library(directory: Path) -> dict[str, str]:
    """Compiles the library into `directory` unless it exists. Returns the environment with which a child finds it, and
    finds no NVIDIA library. Skips the test without a C compiler or the package amdsmi."""
    library = directory / "libamd_smi.so"
    if not library.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        package = importlib.util.find_spec("amdsmi")
        if compiler is None or package is None or package.origin is None:
            pytest.skip("no C compiler or no package amdsmi: the library of AMD GPUs cannot be built")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "libnvidia-ml.so.1").touch()  # found before a real library, and no library
        (directory / "rest.h").write_text(_missing_functions(Path(package.origin).with_name("amdsmi_wrapper.py")))
        unfinished = directory / f"{os.getpid()}.so"
        options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{directory}"]
        subprocess.run([compiler, *options, "-o", str(unfinished), str(SOURCE)], check=True)
        unfinished.replace(library)
    others = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{directory}:{others}" if others else str(directory)}


def _missing_functions(wrapper: Path) -> str:
    wanted = set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper.read_text(encoding="utf-8")))
    defined = set(re.findall(r"^Status (amdsmi_\w+)\(", SOURCE.read_text(encoding="utf-8"), re.M))
    return "".join(f"Status {name}(void) {{ return NOT_SUPPORTED; }}\n" for name in sorted(wanted - defined))


@dataclass(frozen=True)
class AmdGpu:
    """One GPU of a scenario; `figures` are further keys; `None` removes one."""

    name: str = "AMD Instinct MI300X"
    total_mib: int = 196592
    used_mib: int = 0
    processes: tuple[tuple[int, int], ...] = ()  # (pid, MiB)
    figures: Mapping[str, object] = field(default_factory=dict)

    def keys(self, index: int) -> dict[str, object]:
        return {
            "name": self.name,
            "uuid": amd_uuid_of(index),
            "bdf": f"0000:{0x05 + index:02x}:00.0",
            "hip_id": index,
            "numa_node": 0,
            "target": "0x942",
            "driver": "6.14.14",
            "total": self.total_mib * MIB,
            "used": self.used_mib * MIB,
            "hotspot_c": 48 + index,
            "utilization_pct": 3,
            "power_w": 132,
            "energy_uj": 9_000_000_000,
            **{f"process.{number}": f"{pid} {mib * MIB}" for number, (pid, mib) in enumerate(self.processes)},
            **self.figures,
        }


def amd_uuid_of(index: int) -> str:
    return f"12ff74a1-0000-1000-8000-{index:012d}"


def write_scenario(path: Path, gpus: tuple[AmdGpu, ...] = (), **keys: object) -> dict[str, str]:
    """Replaces the hardware atomically, for running processes too. Returns the environment that names it.

    `keys` are further keys of amdsmi.c, with `__` for a dot (`link__0__1="1 2"`).
    """
    lines: dict[str, object] = {"count": len(gpus)}
    for index, gpu in enumerate(gpus):
        lines |= {f"gpu{index}.{key}": value for key, value in gpu.keys(index).items()}
    lines |= {key.replace("__", "."): value for key, value in keys.items()}
    unfinished = path.with_suffix(".new")
    text = "".join(f"{key} {value}\n" for key, value in lines.items() if value is not None)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return {"FAKE_AMDSMI_FILE": str(path)}


def linked(count: int, kind: int = XGMI) -> dict[str, object]:
    """Keys for links of this kind between every two of `count` GPUs."""
    return {f"link__{a}__{b}": f"1 {kind}" for a in range(count) for b in range(a + 1, count)}
