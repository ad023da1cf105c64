"""The run record of each engine, from which a later neuron adopts it."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from neuron.spec import EngineSpec
from shared.protocol import FIRST_INSTANCE
from shared.system.files import replace_file

VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SPEC = TypeAdapter(EngineSpec)
_SPEC_FIELDS = frozenset(field.name for field in fields(EngineSpec))


class RunRecord(BaseModel):
    """One engine. `pid` and `start_ticks` (clock ticks since boot) are None before its start; `ready_at` is the Unix
    time of its first successful health check, None before that. `stopping`: it was asked to stop.

    The file is readable by its owner only, because it contains the engine's keys.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    boot_id: str
    number: int
    engine_id: str
    spec: dict[str, Any]
    instance: str = FIRST_INSTANCE
    variant: str | None = None
    devices: list[int]
    booked_mb: list[int]
    share_mb: int | None = None
    ram_mb: int | None = None  # booked in the host's RAM
    cores: list[int] = []  # of an engine without devices
    host: str
    port: int
    api_key: str | None = None  # None: it serves without a key
    control_key: str = ""
    engine_version: str | None = None  # as its installation said before the start
    can_sleep: bool = False
    keep_alive_secs: float | None = None  # how long it keeps an idle connection, if that is known
    tmp_dir: Path
    pid: int | None = None
    start_ticks: int | None = None
    started_at: float
    ready_at: float | None = None
    load_secs: float | None = None
    stopping: bool = False
    slept_mb: int = 0
    takes_adapters: bool = False
    adapters: dict[str, str] = {}  # what each LoRA adapter was loaded from, the least recently loaded first
    shared_files: list[tuple[str, int]] = []
    """Its files in /dev/shm: path and inode."""

    @property
    def engine_spec(self) -> EngineSpec:
        """Raises ValueError when another version wrote it, with other fields or values."""
        if unknown := self.spec.keys() - _SPEC_FIELDS:
            raise ValueError(f"unknown fields of a spec: {sorted(unknown)}")
        return _SPEC.validate_python({**self.spec, "instance": self.instance, "variant": self.variant})


def spec_fields(spec: EngineSpec) -> dict[str, Any]:
    """A spec as JSON values, without `instance` and `variant`, which the record itself has. `parallel` beyond the
    tensor-parallel size, the context length and what is said of adapters are there only if the spec has them: an
    earlier version of neuron reads no record with other fields."""
    values = {**asdict(spec), "said": sorted(spec.said)}
    del values["instance"], values["variant"]
    for name in ("max_model_len", "fitted_len", "max_loras", "max_lora_rank", "fitted_rank", "lora_sources"):
        if values[name] in (None, ()):
            del values[name]
    if spec.group is None:
        del values["group"]
    else:
        values["group"] = spec.group.model_dump(mode="json")
    if spec.parallel.tensor_only:
        for name in ("pipeline_parallel", "data_parallel", "expert_parallel"):
            del values[name]
    return values


@cache
def boot_id() -> str:
    """Identifies the present boot: pids recorded in another boot are meaningless. The first call blocks."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def write(path: Path, record: RunRecord) -> None:
    """Replaces the record atomically. Not durably: after a power cut no engine of it runs. Blocks.

    Raises:
        OSError: the disk is full or not writable; the earlier record is unchanged.
    """
    replace_file(path, record.model_dump_json().encode(), durable=False)


def read(path: Path) -> RunRecord | None:
    """The record at `path`; None when it is missing or this version cannot read it. Blocks."""
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
        _ = record.engine_spec
    except (OSError, ValidationError, ValueError):
        return None
    return record if record.version == VERSION else None
