"""Books energy in the database. Each method is one transaction, and cortexes with the same database take turns, so that
each Wh is booked once whichever of them reads a meter, and however often they are killed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import Row, bindparam, delete, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cortex.accounts.database.database import Database
from cortex.accounts.database.tables import ENERGY, ENERGY_METERS, ENERGY_SLICES, USAGE
from cortex.accounts.database.usage_days import add_energy_to_days
from cortex.accounts.energy.attribution import (
    EnergyKind,
    EnergySlice,
    InstanceCount,
    MeterReading,
    ServedRequest,
    hour_of,
    parts_by_hour,
    shares,
    work_of,
)

SLICES_AT_ONCE: Final = 200
SET_BACK_SECS: Final = 5.0
"""The time that a reading covers if the clock was set back since the last one."""
_LOOKED_UP_AT_ONCE: Final = 500
_LOCK: Final = 0x656E6572  # any number, the same in every cortex
_SLICE_KEY: Final = ("node", "device", "model", "instance", "started_at")

InstanceAt: TypeAlias = tuple[str, str, str]
"""Node, model and instance."""
_MeterKey: TypeAlias = tuple[str, str, str]
"""Device, model and instance; of a device itself the last two are ""."""


class EnergyEntry(NamedTuple):
    """Energy that has been booked in the table of energy."""

    hour: float
    node: str
    device: str
    model: str
    key_id: str
    kind: EnergyKind


Booked: TypeAlias = Mapping[EnergyEntry, float]
"""Wh."""


class EnergyLedger:
    """`base_of` gives the id of the model whose engines serve a model: an adapter's base, else its own.

    Methods raise DatabaseError when the database cannot be written now; then nothing has changed.
    """

    def __init__(self, database: Database, base_of: Callable[[str], str]) -> None:
        self._database = database
        self._base_of = base_of
        self._insert: Any = postgresql.insert if database.is_postgresql else sqlite.insert

    async def read_meters(self, readings: Sequence[MeterReading]) -> Booked:
        """Adds what the meters have counted since they were last read. Books what no engine has used; the rest waits
        for `settle`. A meter that is read for the first time begins here."""
        booked: defaultdict[EnergyEntry, float] = defaultdict(float)
        slices: list[EnergySlice] = []
        meters: list[dict[str, Any]] = []
        async with self._database.writing() as connection:
            await self._take_turn(connection)
            known: defaultdict[str, dict[_MeterKey, Row[Any]]] = defaultdict(dict)
            asked = select(ENERGY_METERS).where(ENERGY_METERS.c.node.in_([reading.node for reading in readings]))
            for row in await connection.execute(asked):
                known[row.node][row.device, row.model, row.instance] = row
            for reading in readings:
                for device, wh in reading.devices.items():
                    before = known[reading.node].get((device, "", ""))
                    counts = [each for each in reading.instances if each.device == device]
                    if before is not None:
                        if _is_stale(reading, before, wh):
                            continue
                        since = before.read_at if before.read_at < reading.at else reading.at - SET_BACK_SECS
                        found = _slices(reading, device, since, counts, known[reading.node])
                        slices += found
                        used = wh - (before.resident_wh if before.epoch == reading.epoch else 0.0)
                        idle_wh = max(0.0, used - sum(each.wh for each in found))
                        for start, _, part in parts_by_hour(since, reading.at):
                            entry = EnergyEntry(hour_of(start), reading.node, device, "", "", "idle")
                            booked[entry] += idle_wh * part
                    meters += _meter_rows(reading, device, wh, counts)
            await self._write_meters(connection, meters)
            if slices:
                await connection.execute(ENERGY_SLICES.insert(), [each._asdict() for each in slices])
            await self._book(connection, booked)
        return booked

    async def delete_before(self, hour: float) -> None:
        """Deletes what was booked for earlier hours."""
        async with self._database.writing() as connection:
            await connection.execute(delete(ENERGY).where(ENERGY.c.hour < hour))

    async def settle(self, before: float, quiet: Mapping[InstanceAt, float], *, latest: float) -> tuple[Booked, bool]:
        """Books slices: those that ended before `latest`, and before `before` those of an instance that had no request
        at a time after their end, as `quiet` tells. Returns what was booked, and True if there are more.

        The records of all requests that ended before these times must be in the database, as far as they ever will.
        """
        booked: defaultdict[EnergyEntry, float] = defaultdict(float)
        async with self._database.writing() as connection:
            await self._take_turn(connection)
            due = await _due(connection, before, quiet, latest)
            if not due:
                return booked, False
            requests = await self._requests(connection, due)
            by_request: defaultdict[ServedRequest, float] = defaultdict(float)
            for each in due:
                hour = hour_of(each.started_at)
                for wh, request in shares(each, requests.get((each.node, each.model, each.instance), ())):
                    if request is None:
                        booked[EnergyEntry(hour, each.node, each.device, each.model, "", "resident")] += wh
                    else:
                        key = EnergyEntry(hour, each.node, each.device, request.model, request.key_id, "request")
                        booked[key] += wh
                        by_request[request] += wh
            await self._book(connection, booked)
            await _add_to_usage(connection, by_request, is_postgresql=self._database.is_postgresql)
            done = [{f"_{name}": getattr(each, name) for name in _SLICE_KEY} for each in due]
            same = (ENERGY_SLICES.c[name] == bindparam(f"_{name}") for name in _SLICE_KEY)
            await connection.execute(delete(ENERGY_SLICES).where(*same), done)
        return booked, len(due) == SLICES_AT_ONCE

    async def _take_turn(self, connection: AsyncConnection) -> None:
        if self._database.is_postgresql:  # SQLite has one writer at a time
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})

    async def _write_meters(self, connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        written = self._insert(ENERGY_METERS)
        fresh = {name: written.excluded[name] for name in ("epoch", "read_at", "active_wh", "resident_wh")}
        key = ["node", "device", "model", "instance"]
        await connection.execute(written.on_conflict_do_update(index_elements=key, set_=fresh), list(rows))
        await _delete_dropped(connection, rows)

    async def _book(self, connection: AsyncConnection, booked: Booked) -> None:
        rows = [{**key._asdict(), "wh": wh} for key, wh in sorted(booked.items()) if wh > 0]
        if rows:
            added = self._insert(ENERGY)
            sums = {"wh": ENERGY.c.wh + added.excluded.wh}
            await connection.execute(
                added.on_conflict_do_update(index_elements=list(EnergyEntry._fields), set_=sums), rows
            )

    async def _requests(
        self, connection: AsyncConnection, due: Sequence[EnergySlice]
    ) -> dict[InstanceAt, list[ServedRequest]]:
        """The requests that ran during the slices, by the instance that served them."""
        first, last = min(each.started_at for each in due), max(each.ended_at for each in due)
        started = USAGE.c.ended_at - USAGE.c.secs + USAGE.c.queued_secs
        asked = select(USAGE).where(
            USAGE.c.ended_at > first, started < last, USAGE.c.node.in_({each.node for each in due})
        )
        found: dict[InstanceAt, list[ServedRequest]] = {}
        for row in await connection.execute(asked):
            served = ServedRequest(
                request_id=row.request_id,
                ended_at=row.ended_at,
                started_at=row.ended_at - row.secs + row.queued_secs,
                key_id=row.key_id,
                model=row.model,
                work=work_of(row.prompt_tokens, row.cached_tokens, row.completion_tokens),
            )
            found.setdefault((row.node, self._base_of(row.model), row.instance), []).append(served)
        return found


def _is_stale(reading: MeterReading, before: Row[Any], wh: float) -> bool:
    """Another cortex has booked a later reading; or the neuron has lost a part of its count, and what it counts until
    it is back there was booked already. Within an epoch the counts tell, whatever the clocks say."""
    if reading.epoch == before.epoch:
        return bool(wh < before.resident_wh)
    return bool(reading.at <= before.read_at)


def _slices(
    reading: MeterReading,
    device: str,
    since: float,
    counts: Iterable[InstanceCount],
    known: Mapping[_MeterKey, Row[Any]],
) -> list[EnergySlice]:
    found = []
    for count in counts:
        before = known.get((device, count.model, count.instance))
        same = before is not None and before.epoch == reading.epoch
        active = max(0.0, count.active_wh - (before.active_wh if before is not None and same else 0.0))
        resident = max(0.0, count.resident_wh - (before.resident_wh if before is not None and same else 0.0))
        if active + resident > 0:
            found += [
                EnergySlice(
                    reading.node, device, count.model, count.instance, start, end, active * part, resident * part
                )
                for start, end, part in parts_by_hour(since, reading.at)
            ]
    return found


def _meter_rows(
    reading: MeterReading, device: str, wh: float, counts: Iterable[InstanceCount]
) -> Iterable[dict[str, Any]]:
    all_counts = [InstanceCount(device, "", "", 0.0, wh), *counts]
    return [
        {
            "node": reading.node,
            "device": device,
            "model": each.model,
            "instance": each.instance,
            "epoch": reading.epoch,
            "read_at": reading.at,
            "active_wh": each.active_wh,
            "resident_wh": each.resident_wh,
        }
        for each in all_counts
    ]


async def _delete_dropped(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    """Deletes the counts that are missing from the readings just written. A neuron drops those of instances that are
    gone, and never continues them."""
    columns = {"_node": "node", "_device": "device", "_read_at": "read_at"}
    devices = [{name: row[column] for name, column in columns.items()} for row in rows if not row["model"]]
    meter = ENERGY_METERS.c
    same = (meter.node == bindparam("_node"), meter.device == bindparam("_device"))
    await connection.execute(delete(ENERGY_METERS).where(*same, meter.read_at < bindparam("_read_at")), devices)


async def _due(
    connection: AsyncConnection, before: float, quiet: Mapping[InstanceAt, float], latest: float
) -> list[EnergySlice]:
    asked = select(ENERGY_SLICES).where(ENERGY_SLICES.c.ended_at < before).order_by(ENERGY_SLICES.c.ended_at)
    found = []
    for row in await connection.execute(asked):
        each = EnergySlice(*row)
        if each.ended_at < latest or each.ended_at <= quiet.get((each.node, each.model, each.instance), 0.0):
            found.append(each)
            if len(found) == SLICES_AT_ONCE:
                break
    return found


async def _add_to_usage(
    connection: AsyncConnection, by_request: Mapping[ServedRequest, float], *, is_postgresql: bool
) -> None:
    if not by_request:
        return
    wh = {(each.request_id, each.ended_at): wh for each, wh in by_request.items()}
    same = (USAGE.c.request_id == bindparam("_id"), USAGE.c.ended_at == bindparam("_ended_at"))
    added = func.coalesce(USAGE.c.energy_wh, 0.0) + bindparam("_wh")
    rows = [{"_id": name, "_ended_at": ended_at, "_wh": more} for (name, ended_at), more in wh.items()]
    await connection.execute(update(USAGE).where(*same).values(energy_wh=added), rows)
    changed: list[tuple[dict[str, Any], float]] = []
    ids = list({name for name, _ in wh})
    for start in range(0, len(ids), _LOOKED_UP_AT_ONCE):
        asked = select(USAGE).where(USAGE.c.request_id.in_(ids[start : start + _LOOKED_UP_AT_ONCE]))
        found: list[dict[str, Any]] = [dict(row) for row in (await connection.execute(asked)).mappings()]
        changed += [(row, wh[at]) for row in found if (at := (row["request_id"], row["ended_at"])) in wh]
    await add_energy_to_days(connection, changed, is_postgresql=is_postgresql)  # all at once, which it sorts
