"""Reads the condition of GPUs through nvidia-ml-py, and listens to the driver's Xid events."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from typing import Any

import pynvml

from neuron.gpu.device_condition import (
    HEALTHY,
    NO_XIDS,
    GpuCondition,
    XidRecord,
    after_going,
    after_reading,
    fault_of,
    warnings_of,
    with_xid,
)
from neuron.gpu.nvml_device import Handle, figure_or_none
from shared.protocol import DeviceHealth

log = logging.getLogger(__name__)

WAIT_MS = 500  # how long one wait for an event takes at most, and so the end of the thread
_PAUSE_SECS = 1.0  # after a failed wait, as while a GPU is off the bus
_JOIN_SECS = 2.5  # several times that, on a busy host
_EVENTS = pynvml.nvmlEventTypeXidCriticalError


def read_condition(handle: Handle) -> GpuCondition:
    """The driver's flags of one GPU. Blocks.

    Raises:
        pynvml.NVMLError: the device is gone.
    """
    rows = figure_or_none(pynvml.nvmlDeviceGetRemappedRows, handle) or (0, 0, 0, 0)
    reasons = figure_or_none(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:  # drivers before 535 have the older call only
        reasons = figure_or_none(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return GpuCondition(
        recovery_action=_recovery_action(handle),
        energy_mj=figure_or_none(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),
        ecc_uncorrected=figure_or_none(
            pynvml.nvmlDeviceGetTotalEccErrors,
            handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        remap_pending=bool(rows[2]),
        remap_failed=bool(rows[3]),
        clock_reasons=reasons or 0,
    )


def _recovery_action(handle: Handle) -> int | None:
    """What the driver asks for; None if it is older than 570."""
    values = figure_or_none(pynvml.nvmlDeviceGetFieldValues, handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not values or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return int(values[0].value.uiVal)


class ConditionTracker:
    """The condition of each GPU by device index: what the driver says now, and its Xids since the last reset. Used in
    one thread."""

    def __init__(self) -> None:
        self._events = XidEvents()
        self._records: dict[int, XidRecord] = {}
        self._conditions: dict[int, GpuCondition] = {}
        self._xids: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def start(self, handles: Mapping[int, Handle]) -> None:
        """From now on the Xids of these GPUs count."""
        self._events.start(handles)

    def take_events(self) -> None:
        """Counts the Xids since the last call."""
        for index, xid in self._events.take():
            self._records[index] = with_xid(self._records.get(index, NO_XIDS), xid)
            self._xids[index][xid] += 1

    def read(self, index: int, handle: Handle) -> None:
        """Asks the driver.

        Raises:
            pynvml.NVMLError: the device is gone.
        """
        condition = self._conditions[index] = read_condition(handle)
        self._records[index] = after_reading(self._records.get(index, NO_XIDS), condition)

    def mark_gone(self, index: int) -> None:
        """The driver says that the GPU is gone or needs a reset."""
        self._records[index] = after_going(self._records.get(index, NO_XIDS))

    def added_to(self, health: DeviceHealth, gpu: int) -> DeviceHealth:
        """The figures with the condition of the GPU `gpu`, as of its last reading."""
        record, condition = self._records.get(gpu, NO_XIDS), self._conditions.get(gpu, HEALTHY)
        found = {"fault": fault_of(record, condition), "warnings": warnings_of(record, condition)}
        xids = dict(self._xids[gpu]) if health.index == gpu else {}  # not once more for each MIG instance
        return health.model_copy(update={**found, "xids": xids})

    def close(self) -> None:
        """Ends the thread that listens."""
        if not self._events.close():
            log.warning("the driver hangs while neuron waits for Xid events")


class XidEvents:
    """The Xids that the driver reports, collected in a thread of its own, because NVML has only a call that waits."""

    def __init__(self) -> None:
        self._found: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.watched: frozenset[int] = frozenset()
        """The device indices of the GPUs whose events arrive."""

    def start(self, handles: Mapping[int, Handle]) -> None:
        """Registers the GPUs, by device index. Without effect where the driver has no such events. Blocks."""
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            log.info("Xid events are not watched: %s", error)
            return
        registered = {index: handle for index, handle in handles.items() if _register(index, handle, events)}
        if not registered:
            _free(events)
            return
        self.watched = frozenset(registered)
        # A daemon: a driver that hangs must not prevent the end of the process.
        self._thread = threading.Thread(target=self._collect, args=(events, registered), name="nvml-xid", daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[int, int]]:
        """The events since the last call, oldest first: (device index, Xid)."""
        found = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except Empty:
                return found

    def close(self) -> bool:
        """Ends the thread; False if it has not ended, as the driver hangs. Blocks for a few seconds at most."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECS)
        return self._thread is None or not self._thread.is_alive()

    def _collect(self, events: Any, handles: Mapping[int, Handle]) -> None:
        by_address = {_address(handle): index for index, handle in handles.items()}
        while not self._stop.is_set():
            try:
                event = pynvml.nvmlEventSetWait_v2(events, WAIT_MS)
            except pynvml.NVMLError_Timeout:
                continue
            except pynvml.NVMLError as error:
                log.debug("waiting for Xid events failed: %s", error)
                self._stop.wait(_PAUSE_SECS)
                continue
            if event.eventType & _EVENTS:
                self._add(by_address.get(_address(event.device)), int(event.eventData))
        _free(events)

    def _add(self, index: int | None, xid: int) -> None:
        if index is None:
            log.warning("Xid %d of a GPU that neuron does not know", xid)
        else:
            log.warning("GPU %d: the driver reports Xid %d", index, xid)
            self._found.put((index, xid))


def _register(index: int, handle: Handle, events: Any) -> bool:
    try:
        pynvml.nvmlDeviceRegisterEvents(handle, _EVENTS, events)
    except pynvml.NVMLError as error:
        log.info("GPU %d: its Xid events are not watched: %s", index, error)
        return False
    return True


def _free(events: Any) -> None:
    try:
        pynvml.nvmlEventSetFree(events)
    except pynvml.NVMLError as error:
        log.debug("the event set could not be freed: %s", error)


def _address(handle: Handle) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
