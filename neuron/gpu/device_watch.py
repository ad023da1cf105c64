"""Notices when a GPU becomes unfit for use or fit again, tells the listeners of `/events` and writes it to the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from neuron.gpu.device_condition import RESET_ADVICE
from neuron.gpu.energy.meter import EnergyMeter
from neuron.gpu.topology import DeviceReading, TopologySource
from shared.protocol import Device, DeviceHealth

log = logging.getLogger(__name__)

_Condition: TypeAlias = tuple[str | None, tuple[str, ...]]
"""The fault and the warnings of a device."""

INTERVAL_SECS = 1.0
"""Between two looks at the GPUs while no one asks for their figures: the energy is measured then."""


def faults_of(devices: Sequence[Device], health: Sequence[DeviceHealth]) -> dict[int, str]:
    """Why devices cannot be used, by index: lost ones too."""
    lost = {device.index: device.lost for device in devices if device.lost is not None}
    return lost | {live.index: live.fault for live in health if live.fault is not None}


class DeviceWatch:
    """Compares the condition of each device with the last one seen. `publish` takes an event's name and its JSON;
    `meter` gets every reading."""

    def __init__(self, source: TopologySource, publish: Callable[[str, str], None], meter: EnergyMeter) -> None:
        self._source = source
        self._publish = publish
        self._meter = meter
        self._told: dict[int, _Condition] = {}
        self._watched: dict[int, Device] = {}
        self._observed_at = float("-inf")

    def observe(self, devices: Sequence[Device], health: Sequence[DeviceHealth]) -> None:
        """What the driver has just reported. A device is reported when its fault or its warnings change."""
        self._observed_at = time.monotonic()
        faults = faults_of(devices, health)
        warnings = {live.index: tuple(live.warnings) for live in health}
        present = {device.index: device for device in devices}
        # A MIG instance that is gone has no fault any more.
        for index, device in {**self._watched, **present}.items():
            before = self._told.get(index, (None, ()))
            now = (faults.get(index), warnings.get(index, ())) if index in present else (None, ())
            if now != before:
                self._told[index] = now
                self._log(device, before, now, gone=index not in present)
                condition = {"index": index, "uuid": device.uuid, "fault": now[0], "warnings": list(now[1])}
                self._publish("device", json.dumps(condition))
        self._watched = present

    async def read(self) -> DeviceReading:
        """Looks at the GPUs now. The energy is what they have used since `EnergyMeter.epoch` began."""
        reading = await self._source.read()
        self.observe(reading.topology.devices, reading.health)
        await self._meter.observe(reading)
        return DeviceReading(reading.topology, self._meter.added_to(reading.health))

    async def run(self) -> None:
        """Looks at the GPUs whenever no one has for some time. Never returns."""
        while True:
            left = self._observed_at + INTERVAL_SECS - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                continue
            _ = await self.read()

    def _log(self, device: Device, before: _Condition, now: _Condition, *, gone: bool) -> None:
        (fault, warnings), index = now, device.index
        if gone:
            log.info("GPU %d does not exist any more", index)
        elif fault is None and before[0] is not None:
            log.warning("GPU %d can be used again", index)
        elif fault != before[0] and device.lost is None:  # of a lost one the source has said what to do
            log.error("GPU %d cannot be used: %s; %s", index, fault, RESET_ADVICE)
        for warning in warnings:
            if warning not in before[1]:
                log.warning("GPU %d: %s", index, warning)
