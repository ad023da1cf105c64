"""What loads took on this host, as values: kept by model, bounded, and turned into what the next load will take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuron.progress.phases import DOWNLOADING, PHASES
from neuron.spec import EngineSpec

MAX_LOADS = 5  # kept of each model
MAX_MODELS = 500
VERSION = 1  # of the file's form


@dataclass(frozen=True)
class LoadKey:
    """Loads with the same key take about the same time."""

    model_id: str
    harness: str
    tensor_parallel: int
    quant: str | None
    source: str

    @classmethod
    def of(cls, spec: EngineSpec) -> LoadKey:
        return cls(spec.model_id, spec.harness, spec.tensor_parallel, spec.quant, spec.source)


@dataclass(frozen=True)
class LoadTimes:
    """Seconds of each phase of one load, or of what one is expected to take; a phase that was left out is not in it."""

    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_secs(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class History:
    """The last successful loads of each key, oldest first; the key that loaded last comes last."""

    loads: Mapping[LoadKey, tuple[LoadTimes, ...]] = field(default_factory=dict)

    def with_load(self, key: LoadKey, times: LoadTimes) -> History:
        """With one more. The oldest load of the key, and the key that has not loaded for longest, make room."""
        kept = {other: loads for other, loads in self.loads.items() if other != key}
        kept[key] = (*self.loads.get(key, ()), times)[-MAX_LOADS:]
        return History(dict(list(kept.items())[-MAX_MODELS:]))

    def expected(self, key: LoadKey) -> LoadTimes | None:
        """What the next load will take; None when there was none before.

        The lower median of each phase. A first load reads its weights from the disk and compiles; those after it find
        both in caches and take a fraction of that. With two loads the lower median is the warm one, so the first, cold
        one no longer counts from the second on; nor does, later, a single load that had to share the disk or came
        after a reboot, as the last load alone would. A real change (other arguments, another disk) is believed after
        three loads. Where it is wrong, it is too short, and the load's own pace corrects that while it runs.

        Downloads are left out: what was downloaded is there the next time.
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
    """As it stands in the file."""
    return {
        "version": VERSION,
        "models": [
            {
                "model_id": key.model_id,
                "harness": key.harness,
                "tensor_parallel": key.tensor_parallel,
                "quant": key.quant,
                "source": key.source,
                "loads": [{phase: round(secs, 3) for phase, secs in times.phases.items()} for times in loads],
            }
            for key, loads in history.loads.items()
        ],
    }


def from_json(data: object) -> History:
    """What `to_json` made, bounds applied anew.

    Raises:
        ValueError: it is something else; the message says what.
    """
    match data:
        case {"version": int(version), "models": list(models)} if version == VERSION:
            return History(dict(_entry(entry) for entry in models[-MAX_MODELS:]))
        case _:
            raise ValueError(f"not version {VERSION} of the form")


def _entry(entry: object) -> tuple[LoadKey, tuple[LoadTimes, ...]]:
    match entry:
        case {
            "model_id": str(model_id),
            "harness": str(harness),
            "tensor_parallel": int(tensor_parallel),
            "quant": (str() | None) as quant,
            "source": str(source),
            "loads": list(loads),
        }:
            key = LoadKey(model_id, harness, tensor_parallel, quant, source)
            return key, tuple(_times(times) for times in loads[-MAX_LOADS:])
        case _:
            raise ValueError(f"{entry!r:.100} does not say which model took what")


def _times(times: object) -> LoadTimes:
    if isinstance(times, dict) and all(
        phase in PHASES and isinstance(secs, int | float) and math.isfinite(secs) and secs >= 0
        for phase, secs in times.items()
    ):
        return LoadTimes({phase: float(secs) for phase, secs in times.items()})
    raise ValueError(f"{times!r:.100} are no seconds of phases")
