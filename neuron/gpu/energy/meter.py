"""Counts the energy of the GPUs and of the engines on them, and keeps the counts over a restart of neuron."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuron.gpu.energy.sharing import JOULES_PER_WH, Portion, PowerSample, Resident, claims_on, portions, used_wh
from neuron.gpu.topology import DeviceReading
from neuron.spec import InstanceKey
from shared.protocol import Device, DeviceHealth, InstanceEnergy
from shared.system.files import replace_file

log = logging.getLogger(__name__)

FILE_NAME = "energy.json"  # in the state directory
SHORTEST_SECS = 0.25
"""Readings that follow each other faster are left out."""
MAX_COUNTS = 200
"""Counts of instances that are kept. Those of instances that are gone are dropped then, the oldest first."""
_MAX_BYTES = 2**20
_LONG_AGO = float("-inf")
_DIGITS = 9  # of Wh, in what callers see


class EnergyMeter:
    """Owns the counts, all of them in Wh since `epoch` began. They never fall within an epoch.

    Counts are written to the file before callers see them, so that a neuron that is killed goes on from there. `path`
    None: memory only. `boot_id`: counts of another boot are not continued. `residents` says which instances there are.
    """

    def __init__(self, path: Path | None, boot_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.residents: Callable[[], Sequence[Resident]] = tuple
        self.epoch = uuid.uuid4().hex
        self._path = path
        self._boot_id = boot_id
        self._clock = clock
        self._observing = asyncio.Lock()
        self._samples: dict[str, PowerSample] = {}  # the last ones, by GPU
        self._devices: dict[str, float] = {}
        self._instances: dict[tuple[str, InstanceKey], Portion] = {}
        self._floors_w: dict[str, float] = {}  # the lowest power of each GPU while it had an instance
        self._marks: dict[InstanceKey, tuple[float, ...]] = {}
        self._indices: dict[str, int] = {}
        self._shown: tuple[dict[int, float], tuple[InstanceEnergy, ...]] = ({}, ())
        self._failed = False

    async def read(self) -> None:
        """Reads what an earlier neuron wrote. Without it, or after a reboot, an epoch begins."""
        if self._path is None:
            return
        try:
            record = await asyncio.to_thread(_read, self._path)
            if record["boot_id"] == self._boot_id:
                self._restore(record)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, so energy is counted from 0: %r", self._path, error)

    def _restore(self, record: dict[str, Any]) -> None:
        devices, samples, instances = {}, {}, {}
        for device, wh, counter_wh in record["devices"]:
            devices[str(device)] = float(wh)
            samples[str(device)] = PowerSample(_LONG_AGO, None, None if counter_wh is None else float(counter_wh))
        for device, model_id, instance, active_wh, resident_wh in record["instances"]:
            key = InstanceKey(str(model_id), str(instance))
            instances[str(device), key] = Portion(float(active_wh), float(resident_wh))
        self.epoch = str(record["epoch"])
        self._devices, self._samples, self._instances = devices, samples, instances

    def requests_on(self, index: int) -> int:
        """Requests that run on a device now, as far as engines tell."""
        return sum(resident.requests or 0 for resident in self.residents() if index in resident.devices)

    async def observe(self, reading: DeviceReading) -> None:
        """Adds what the GPUs have used since the last reading."""
        async with self._observing:
            now = self._clock()
            if any(now - sample.at < SHORTEST_SECS for sample in self._samples.values()):
                return
            self._add(reading, now)
            await self._save()
            self._show()

    def added_to(self, health: Sequence[DeviceHealth]) -> list[DeviceHealth]:
        """The figures with the energy of each device, None for those that have no meter."""
        counts = self._shown[0]
        return [live.model_copy(update={"energy_wh": counts.get(live.index)}) for live in health]

    @property
    def instances(self) -> tuple[InstanceEnergy, ...]:
        """What instances have used, present ones and others."""
        return self._shown[1]

    def _add(self, reading: DeviceReading, now: float) -> None:
        devices = reading.topology.devices
        health = {live.index: live for live in reading.health}
        residents = self.residents()
        marks = {resident.key: resident.marks for resident in residents}
        busy = {key: self._marks.get(key, mark) != mark for key, mark in marks.items()}
        self._indices = {}
        for gpu in devices:
            live = health.get(gpu.index)
            if gpu.parent is not None or live is None or (live.power_w is None and live.energy_wh is None):
                continue
            name = gpu.uuid or str(gpu.index)
            self._indices[name] = gpu.index
            sample = PowerSample(now, live.power_w, live.energy_wh)
            before = self._samples.get(name, sample)
            claims = claims_on(gpu, devices, health, residents, busy)
            self._note_floor(name, gpu, sample, occupied=bool(claims))
            wh = used_wh(before, sample)
            self._devices[name] = self._devices.get(name, 0.0) + wh
            # What was used while neuron was gone is for no request: nothing is known of those.
            idle_wh = (
                wh if before.at == _LONG_AGO else self._floors_w.get(name, 0.0) * (now - before.at) / JOULES_PER_WH
            )
            for key, portion in portions(wh, idle_wh, claims).items():
                known = self._instances.pop((name, key), Portion(0.0, 0.0))  # to the end: dropped last
                self._instances[name, key] = Portion(
                    known.active_wh + portion.active_wh, known.resident_wh + portion.resident_wh
                )
            self._samples[name] = sample
        self._marks = marks
        for gone in list(self._instances)[: max(0, len(self._instances) - MAX_COUNTS)]:
            del self._instances[gone]

    def _note_floor(self, name: str, gpu: Device, sample: PowerSample, *, occupied: bool) -> None:
        if occupied and sample.power_w is not None:
            self._floors_w[name] = min(sample.power_w, self._floors_w.get(name, sample.power_w))

    def _show(self) -> None:
        counts = {index: round(self._devices[name], _DIGITS) for name, index in self._indices.items()}
        instances = tuple(
            InstanceEnergy(
                device=self._indices[name],
                id=key.model_id,
                instance=key.instance,
                active_wh=round(portion.active_wh, _DIGITS),
                resident_wh=round(portion.resident_wh, _DIGITS),
            )
            for (name, key), portion in self._instances.items()
            if name in self._indices
        )
        self._shown = counts, instances

    async def _save(self) -> None:
        if self._path is None:
            return
        record = {
            "boot_id": self._boot_id,
            "epoch": self.epoch,
            "devices": [(name, wh, self._samples[name].counter_wh) for name, wh in self._devices.items()],
            "instances": [(name, *key, *portion) for (name, key), portion in self._instances.items()],
        }
        try:
            await asyncio.to_thread(replace_file, self._path, json.dumps(record).encode(), durable=False)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written: %s", self._path, error)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("too large")
    record = json.loads(data)
    if not isinstance(record, dict):
        raise TypeError("not an object")
    return record
