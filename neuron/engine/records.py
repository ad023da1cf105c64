"""What is written down of each engine, so that a neuron that comes after this one knows it again."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from neuron.harness.registry import HARNESSES
from neuron.spec import EngineSpec
from shared.files import replace_file

VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SPEC = TypeAdapter(EngineSpec)
_SPEC_FIELDS = frozenset(field.name for field in fields(EngineSpec))


class RunRecord(BaseModel):
    """One engine. `pid` and `start_ticks` (clock ticks since boot) are None before it has been started; `ready_at` is
    the Unix time of its first healthy answer, None before that. `stopping`: its end had been asked for.

    Readable by its owner alone: it has the engine's keys.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    boot_id: str
    number: int
    engine_id: str
    spec: dict[str, Any]
    devices: list[int]
    booked_mb: list[int]
    share_mb: int | None = None
    host: str
    port: int
    api_key: str
    control_key: str = ""
    can_sleep: bool = False
    tmp_dir: Path
    pid: int | None = None
    start_ticks: int | None = None
    started_at: float
    ready_at: float | None = None
    load_secs: float | None = None
    stopping: bool = False
    slept_mb: int = 0
    shared_files: list[tuple[str, int]] = []
    """What it has in /dev/shm, by path and inode."""

    @property
    def engine_spec(self) -> EngineSpec:
        """Raises ValueError when it was written by a version that had other fields, or other values for them."""
        if unknown := self.spec.keys() - _SPEC_FIELDS:
            raise ValueError(f"fields of a spec that are not known: {sorted(unknown)}")
        spec = _SPEC.validate_python(self.spec)
        if spec.harness not in HARNESSES:
            raise ValueError(f"unknown harness {spec.harness!r}")
        return spec


def spec_fields(spec: EngineSpec) -> dict[str, Any]:
    """A spec as JSON has it."""
    return {**asdict(spec), "said": sorted(spec.said)}


@cache
def boot_id() -> str:
    """Names the time since the last boot: pids of another boot mean nothing. Blocks the first time."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def write(path: Path, record: RunRecord) -> None:
    """Replaces the record, all of it or nothing, also when the power fails. Blocks.

    Raises:
        OSError: the disk is full, or not writable; what was there before is still there.
    """
    replace_file(path, record.model_dump_json().encode())


def read(path: Path) -> RunRecord | None:
    """The record at `path`; None when there is none that this version understands. Blocks."""
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
        _ = record.engine_spec
    except (OSError, ValidationError, ValueError):
        return None
    return record if record.version == VERSION else None
