"""What the sources of GPU facts over a driver's library have in common: a thread, handles, and GPUs that are lost."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from neuron.gpu.sources.driver_thread import DriverThread
from neuron.gpu.topology import DeviceReading, Topology
from shared.protocol import DeviceHealth

log = logging.getLogger(__name__)

Handle: TypeAlias = Any
Result = TypeVar("Result")


class DriverSource(ABC):
    """`neuron.gpu.topology.TopologySource` over a library whose calls block. The methods and attributes with an
    underscore belong to its thread, `name`.

    A GPU for which a call raises one of `_errors` is lost: it is missing in the figures until it answers again.
    """

    _errors: tuple[type[Exception], ...] = ()

    def __init__(self, name: str) -> None:
        self._thread = DriverThread(name)
        self._handles: dict[int, Handle] = {}
        self._lost: dict[int, str] = {}

    async def discover(self) -> Topology:
        return await self._thread.call(self._discover)

    async def read(self) -> DeviceReading:
        return await self._thread.call(self._read)

    async def process_memory_mb(self) -> Mapping[int, Mapping[int, int]]:
        return await self._thread.call(self._read_process_memory)

    async def close(self) -> None:
        """Shuts the library down, unless the driver hangs. May be called again."""
        await self._thread.close(self._shut_down)

    @abstractmethod
    def _look_up(self) -> Topology:
        """The present devices and their links; `lost` of a device may be out of date."""

    @abstractmethod
    def _health_of(self, index: int, handle: Handle) -> DeviceHealth:
        """The live figures of a GPU."""

    @abstractmethod
    def _read_process_memory(self) -> dict[int, dict[int, int]]:
        """As `process_memory_mb`."""

    @abstractmethod
    def _lost_reason(self, error: Any) -> str:
        """What one of `_errors` says of a GPU, and what to do."""

    @abstractmethod
    def _shut_down(self) -> None: ...

    def _discover(self) -> Topology:
        return self._with_lost(self._look_up())

    def _read(self) -> DeviceReading:
        found = self._look_up()
        figures = self._read_figures()
        return DeviceReading(self._with_lost(found), figures)  # after the figures, which show what is lost

    def _with_lost(self, topology: Topology) -> Topology:
        devices = (device.model_copy(update={"lost": self._lost.get(device.index)}) for device in topology.devices)
        return replace(topology, devices=tuple(devices))

    def _read_figures(self) -> list[DeviceHealth]:
        figures = self._read_devices(self._health_of)
        for index in figures:
            if self._lost.pop(index, None) is not None:
                log.warning("GPU %d answers again", index)
        return list(figures.values())

    def _read_devices(self, read: Callable[[int, Handle], Result]) -> dict[int, Result]:
        """`read` of each GPU that answers, by index. Marks the others as lost."""
        results = {}
        for index, handle in self._handles.items():
            try:
                results[index] = read(index, handle)
            except self._errors as error:
                self._mark_lost(index, error)
        return results

    def _mark_lost(self, index: int, error: Any) -> None:
        reason = self._lost_reason(error)
        if self._lost.get(index) != reason:
            log.error("GPU %d cannot be used: %s", index, reason)
        self._lost[index] = reason
