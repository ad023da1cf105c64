"""Simulated GPU memory: one file per holder in a directory, as NVML lists one entry per process.

A holder is a process, identified by pid and start time: the memory of a dead process is free immediately, and a reused
pid holds nothing. Processes that are not engines are simulated in the same way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.system.files import replace_file
from shared.system.process_stat import stat_of

VRAM_DIR_VARIABLE = "NEURON_SIM_VRAM_DIR"
"""Environment variable: the directory of the holders' files, for a simulated engine."""
DEVICES_VARIABLE = "NEURON_SIM_DEVICES"
"""Environment variable: the engine's devices, as a JSON object of device uuid -> total MiB."""
RAM_NAME = "RAM"
"""Stands for the host's RAM where others have a device's uuid."""
DEFAULT_DEVICE_VRAM_MB = 1024
"""What a simulated engine takes on each device by default."""

CONDITIONS_FILE = "conditions"
"""In the directory of the holders' files: JSON, such as `{"0": {"fault": "Xid 79", "warnings": ["too hot"]}}`. It makes
simulated GPUs sick, by index or uuid."""


@dataclass(frozen=True)
class SimulatedCondition:
    """The `DeviceHealth.fault`, `warnings` and `xids` of one simulated GPU."""

    fault: str | None = None
    warnings: tuple[str, ...] = ()
    xids: Mapping[int, int] = field(default_factory=dict)


def process_start_ticks(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when it has exited."""
    stat = stat_of(pid)
    return stat.start_ticks if stat is not None and stat.alive else None


def hold(directory: Path, usage_mb: Mapping[str, int], *, pid: int | None = None) -> None:
    """Records what a process (by default this one) holds, in MiB by device uuid. Replaces its record atomically."""
    pid = os.getpid() if pid is None else pid
    record = {"pid": pid, "start_ticks": process_start_ticks(pid), "usage_mb": dict(usage_mb)}
    replace_file(directory / f"{pid}.json", json.dumps(record).encode(), durable=False)


def usage_by_process(directory: Path) -> dict[int, dict[str, int]]:
    """What live processes hold: pid -> device uuid -> MiB. Removes the files of dead ones."""
    usage: dict[int, dict[str, int]] = {}
    for path in directory.glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            pid, start_ticks, held = int(record["pid"]), record["start_ticks"], dict(record["usage_mb"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            continue  # a file that is being edited by hand: read it next time
        if start_ticks is None or process_start_ticks(pid) != start_ticks:
            path.unlink(missing_ok=True)
            continue
        usage[pid] = {str(uuid): int(mb) for uuid, mb in held.items()}
    return usage


def used_mb(directory: Path) -> Counter[str]:
    """MiB in use by device uuid, all live processes together."""
    total: Counter[str] = Counter()
    for held in usage_by_process(directory).values():
        total.update(held)
    return total


def conditions(directory: Path) -> dict[str, SimulatedCondition]:
    """What `CONDITIONS_FILE` says, by index or uuid; empty without the file, and while it is being edited."""
    try:
        entries = json.loads((directory / CONDITIONS_FILE).read_text(encoding="utf-8"))
        return {
            str(key): SimulatedCondition(
                entry.get("fault"),
                tuple(map(str, entry.get("warnings", ()))),
                {int(xid): int(count) for xid, count in entry.get("xids", {}).items()},
            )
            for key, entry in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
