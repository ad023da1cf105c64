"""What was counted before, and whether a new count is worse. Pure, but for reading the record."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORD = Path(__file__).with_name("recorded.json")
TOLERANCE_PCT = 3.0
"""About three times the widest spread of four counts on a busy machine (docs/benchmarks-fleet.md)."""
_PACKAGES = ("aiohttp", "httptools", "msgspec", "prometheus-client", "pydantic", "uvloop")


@dataclass(frozen=True)
class Record:
    """`versions` is what the counts depend on beside our own code: counts of other versions cannot be compared."""

    versions: dict[str, str]
    tolerance_pct: float
    instructions: dict[str, float]


def installed_versions() -> dict[str, str]:
    """Of everything that executes instructions for cortex, and of what counts them."""
    found = {
        "python": sys.version,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "avx2": "yes" if " avx2" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace") else "no",
        "valgrind": _valgrind_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _valgrind_version() -> str:
    executable = shutil.which("valgrind")
    if executable is None:
        return "not installed"
    return subprocess.run([executable, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def read_record(path: Path = RECORD) -> Record:
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def write_record(record: Record, path: Path = RECORD) -> None:
    path.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def other_versions(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs, as `name: recorded, here`."""
    names = sorted({*recorded, *here})
    return [f"{n}: {recorded.get(n)}, here {here.get(n)}" for n in names if recorded.get(n) != here.get(n)]


def change_pct(recorded: float, counted: float) -> float:
    return (counted / recorded - 1) * 100


def worse(record: Record, counted: Mapping[str, float]) -> list[str]:
    """The names of what takes more instructions than recorded, by more than the tolerance; of what is gone, too."""
    return [
        name
        for name, value in record.instructions.items()
        if name not in counted or change_pct(value, counted[name]) > record.tolerance_pct
    ]
