"""How long loads took on this host, by model, and what the next one is expected to take. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuron.progress.phases import DOWNLOADING, PHASES
from neuron.spec import EngineSpec

MAX_LOADS = 5  # per key
MAX_MODELS = 500
RAM_FADING = 4  # after a smaller engine, a model's RAM falls by 1/RAM_FADING of the difference
VERSION = 1  # of the file format


@dataclass(frozen=True)
class LoadKey:
    """Loads with the same key take about the same time."""

    model_id: str
    harness: str
    tensor_parallel: int
    quant: str | None
    source: str
    parallel: str = ""
    """Beyond the tensor-parallel size, in words."""

    @classmethod
    def of(cls, spec: EngineSpec) -> LoadKey:
        parallel = "" if spec.parallel.tensor_only else str(spec.parallel)
        return cls(spec.model_id, spec.harness, spec.tensor_parallel, spec.quant, spec.source, parallel)


@dataclass(frozen=True)
class LoadTimes:
    """Seconds of each phase of one load, measured or expected; skipped phases are absent."""

    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_secs(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class History:
    """The last successful loads of each key, oldest first; the key with the latest load comes last."""

    loads: Mapping[LoadKey, tuple[LoadTimes, ...]] = field(default_factory=dict)
    ram_mb: Mapping[LoadKey, int] = field(default_factory=dict)
    """The most that engines of a key used lately of the host's RAM; only of keys with a load."""

    def with_load(self, key: LoadKey, times: LoadTimes) -> History:
        """With one more load; drops the key's oldest load and the key that has not loaded for longest, if too many."""
        kept = {other: loads for other, loads in self.loads.items() if other != key}
        kept[key] = (*self.loads.get(key, ()), times)[-MAX_LOADS:]
        loads = dict(list(kept.items())[-MAX_MODELS:])
        return History(loads, {other: mb for other, mb in self.ram_mb.items() if other in loads})

    def with_ram(self, key: LoadKey, mb: int) -> History:
        """With the most RAM that an engine used from its start to its end. If that is less than before, the figure
        falls by a quarter of the difference: the engine may have had few requests. The same without a load of the key.
        """
        before = self.ram_mb.get(key, mb)
        known = max(mb, before - -(-(before - mb) // RAM_FADING))
        if key not in self.loads or known == self.ram_mb.get(key):
            return self
        return History(self.loads, {**self.ram_mb, key: known})

    def expected(self, key: LoadKey) -> LoadTimes | None:
        """Expected times of the next load; None without an earlier one.

        The lower median of each phase. A first load reads its weights from disk and compiles; later ones find both in
        caches and take a fraction of that. With two loads the lower median is the warm one, so the cold first load
        stops counting from the second on. Later, a single slow load (shared disk, reboot) does not count either, unlike
        with the last load alone. A real change (other arguments, another disk) takes effect after three loads. Errors
        are towards too short, and the pace of the running load corrects them.

        Downloads are left out: the next load finds the files.
        """
        loads = self.loads.get(key)
        if not loads:
            return None
        middle = {
            phase: sorted(times.phases.get(phase, 0.0) for times in loads)[(len(loads) - 1) // 2]
            for phase in PHASES
            if phase != DOWNLOADING
        }
        return LoadTimes({phase: secs for phase, secs in middle.items() if secs > 0})


def to_json(history: History) -> dict[str, Any]:
    """The content of the file."""
    return {
        "version": VERSION,
        "models": [
            {
                "model_id": key.model_id,
                "harness": key.harness,
                "tensor_parallel": key.tensor_parallel,
                "quant": key.quant,
                "source": key.source,
                **({"parallel": key.parallel} if key.parallel else {}),
                **({"ram_mb": history.ram_mb[key]} if key in history.ram_mb else {}),
                "loads": [{phase: round(secs, 3) for phase, secs in times.phases.items()} for times in loads],
            }
            for key, loads in history.loads.items()
        ],
    }


def from_json(data: object) -> History:
    """The inverse of `to_json`; applies the limits again.

    Raises:
        ValueError: says what is wrong with `data`.
    """
    match data:
        case {"version": int(version), "models": list(models)} if version == VERSION:
            entries = [_entry(entry) for entry in models[-MAX_MODELS:]]
            ram_mb = {key: mb for key, _, mb in entries if mb is not None}
            return History({key: loads for key, loads, _ in entries}, ram_mb)
        case _:
            raise ValueError(f"not version {VERSION} of the format")


def _entry(entry: object) -> tuple[LoadKey, tuple[LoadTimes, ...], int | None]:
    match entry:
        case {
            "model_id": str(model_id),
            "harness": str(harness),
            "tensor_parallel": int(tensor_parallel),
            "quant": (str() | None) as quant,
            "source": str(source),
            "loads": list(loads),
            **rest,
        } if isinstance(parallel := rest.get("parallel", ""), str):
            key = LoadKey(model_id, harness, tensor_parallel, quant, source, parallel)
            ram_mb = rest.get("ram_mb")
            if ram_mb is not None and not (isinstance(ram_mb, int) and ram_mb > 0):
                raise ValueError(f"invalid ram_mb {ram_mb!r:.100}")
            return key, tuple(_times(times) for times in loads[-MAX_LOADS:]), ram_mb
        case _:
            raise ValueError(f"invalid entry {entry!r:.100}")


def _times(times: object) -> LoadTimes:
    if isinstance(times, dict) and all(
        phase in PHASES and isinstance(secs, int | float) and math.isfinite(secs) and secs >= 0
        for phase, secs in times.items()
    ):
        return LoadTimes({phase: float(secs) for phase, secs in times.items()})
    raise ValueError(f"invalid times {times!r:.100}")
