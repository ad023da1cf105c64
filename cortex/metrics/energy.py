"""Books what the engines' energy was used for, as long as cortex runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cortex.accounts.database.source import DatabaseError
from cortex.accounts.energy.attribution import HOUR_SECS, EnergyKind, InstanceCount, MeterReading
from cortex.config.live import LiveConfig
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, instance_of
from cortex.fleet.state import Fleet
from cortex.routing.replica import ReplicaKey

if TYPE_CHECKING:  # imports SQLAlchemy, which workers do not need
    from cortex.accounts.database.database import Database
    from cortex.accounts.energy.ledger import Booked, EnergyLedger, InstanceAt

log = logging.getLogger(__name__)

INTERVAL_SECS: Final = 5.0
RECORD_SECS: Final = 5.0
"""After this time the record of a request that has ended is in the database."""
HOLD_SECS: Final = 600.0
"""Energy waits at most this long for the end of the requests that it was used for."""
_LAG_SECS: Final = 2.0  # of the requests that a neuron tells


class EnergyTotals:
    """Wh that this cortex has booked since it began, by model ("" of an idle device) and kind."""

    def __init__(self) -> None:
        self.wh: defaultdict[tuple[str, EnergyKind], float] = defaultdict(float)

    def add(self, booked: Booked) -> None:
        for key, wh in booked.items():
            self.wh[key.model, key.kind] += wh


class EnergyBooks:
    """Reads the meters of the fleet into a ledger, and books what they counted once the requests of that time have
    ended. `in_flight` are this cortex's own requests. `now`: seconds since 1970; `clock`: the fleet's."""

    def __init__(
        self,
        ledger: EnergyLedger,
        snapshot: Callable[[], FleetSnapshot],
        in_flight: Callable[[], Mapping[ReplicaKey, int]],
        totals: EnergyTotals,
        retention_days: Callable[[], int],
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._snapshot = snapshot
        self._in_flight = in_flight
        self._totals = totals
        self._retention_days = retention_days
        self._now = now
        self._clock = clock
        self._quiet: dict[InstanceAt, float] = {}  # when an instance was last seen without requests
        self._delete_at = 0.0
        self._failed = False

    async def run(self) -> None:
        """Never returns. What cannot be booked now, because the database does not answer, is booked later."""
        while True:
            try:
                await self.book()
                if self._failed:
                    log.info("energy can be booked again")
                self._failed = False
            except DatabaseError as error:
                if not self._failed:
                    self._failed = True
                    log.warning("energy cannot be booked now: %s", error)
            await asyncio.sleep(INTERVAL_SECS)

    async def book(self) -> None:
        """Raises DatabaseError when the database cannot be written now."""
        nodes = [node for node in self._snapshot().nodes.values() if node.healthy]
        since = self._now() - self._clock()
        readings = [each for node in nodes if (each := reading_of(node, since)) is not None]
        if readings:
            self._totals.add(await self._ledger.read_meters(readings))
        quiet, more = self._quiet, True
        held = {at: when for at, when in quiet.items() if when > self._now() - HOLD_SECS}
        self._quiet = held | dict(quiet_instances(nodes, readings, self._in_flight()))
        while more:
            now = self._now()
            # As it was the last time: the records of requests that ended before that have arrived.
            booked, more = await self._ledger.settle(now - RECORD_SECS, quiet, latest=now - HOLD_SECS)
            self._totals.add(booked)
        await self._delete_old(self._now())

    async def _delete_old(self, now: float) -> None:
        """Deletes once an hour what is older than usage is kept."""
        days = self._retention_days()
        if days and now >= self._delete_at:
            await self._ledger.delete_before(now - days * 86_400)
            self._delete_at = now + HOUR_SECS


def energy_books(
    database: Database | None,
    live: LiveConfig,
    fleet: Fleet,
    in_flight: Callable[[], Mapping[ReplicaKey, int]],
    totals: EnergyTotals,
) -> EnergyBooks | None:
    """None without a database that can be written."""
    if database is None or database.read_only:
        return None
    from cortex.accounts.energy.ledger import EnergyLedger  # noqa: PLC0415 - imports SQLAlchemy

    ledger = EnergyLedger(database, lambda name: live.catalogue.requested(name).model_id)
    return EnergyBooks(ledger, fleet.snapshot, in_flight, totals, lambda: live.config.usage.retention_days)


def reading_of(node: NodeSnapshot, clock_began: float) -> MeterReading | None:
    """The meters of a neuron as last polled; None if it has none. `clock_began`: when the fleet's clock was 0, in
    seconds since 1970."""
    health = node.health
    if health is None or health.energy_epoch is None or node.health_at is None:
        return None
    devices = {str(live.index): live.energy_wh for live in health.devices if live.energy_wh is not None}
    if not devices:
        return None
    counts = tuple(
        InstanceCount(str(each.device), each.id, each.instance or "", each.active_wh, each.resident_wh)
        for each in health.energy
    )
    return MeterReading(node.name, health.energy_epoch, clock_began + node.health_at, devices, counts)


def unmetered(nodes: Iterable[NodeSnapshot]) -> list[dict[str, str]]:
    """What uses energy that is not counted: `node`, `device` ("" for all of the host) and `reason`. Pure."""
    found = []
    for node in nodes:
        health, known = node.health, [] if node.discovery is None else node.discovery.devices
        gpus = [each.index for each in known if not each.is_mig_instance and each.lost is None]
        metered = set() if health is None else {live.index for live in health.devices if live.energy_wh is not None}
        if metered:
            missing = [(str(index), "the device has no meter") for index in gpus if index not in metered]
        elif health is None:
            missing = [("", "its neuron has not answered yet")]
        elif not gpus:
            missing = [("", "it has no GPU, and CPUs have no meter")]
        elif health.energy_epoch is None:
            missing = [("", "its neuron does not count energy")]
        else:
            missing = [("", "its GPUs have no meter")]
        found += [{"node": node.name, "device": device, "reason": reason} for device, reason in missing]
    return found


def quiet_instances(
    nodes: Sequence[NodeSnapshot], readings: Sequence[MeterReading], in_flight: Mapping[ReplicaKey, int]
) -> Iterator[tuple[InstanceAt, float]]:
    """The instances without requests, and when that was, in seconds since 1970."""
    activity = {
        (node.name, each.id, instance_of(each)): each.in_flight + each.queue_depth
        for node in nodes
        if node.health is not None
        for each in node.health.models
    }
    for reading in readings:
        for count in reading.instances:
            at = (reading.node, count.model, count.instance)
            here = in_flight.get(ReplicaKey(count.model, reading.node, count.instance), 0)
            if not here and not activity.get(at, 0):
                yield at, reading.at - _LAG_SECS
