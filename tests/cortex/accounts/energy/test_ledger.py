"""Booking energy in a real database, SQLite and PostgreSQL."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select

from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.source import DatabaseSource, database_source
from cortex.accounts.database.tables import ENERGY, ENERGY_METERS, ENERGY_SLICES, USAGE, USAGE_DAYS
from cortex.accounts.energy.attribution import InstanceCount, MeterReading, hour_of
from cortex.accounts.energy.ledger import EnergyLedger

START = 1_800_000_000.0  # a full hour


@pytest.fixture(params=["sqlite", "postgresql"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseSource:
    url = request.getfixturevalue("new_postgresql")() if request.param == "postgresql" else None
    found = database_source(url, tmp_path / "state")
    assert found is not None
    return found


@pytest.fixture
async def database(source: DatabaseSource) -> AsyncIterator[Database]:
    opened = await open_database(source)
    yield opened
    await opened.close()


def ledger(database: Database) -> EnergyLedger:
    return EnergyLedger(database, lambda name: {"adapter": "m"}.get(name, name))


def reading(
    at: float, total: float, *, m: tuple[float, float] | None = None, epoch: str = "e", node: str = "n"
) -> MeterReading:
    """One GPU, and the counts of the engine of `m` if it has one, `at` seconds after START."""
    counts = () if m is None else (InstanceCount("0", "m", "1", *m),)
    return MeterReading(node, epoch, START + at, {"0": total}, counts)


async def add_usage(database: Database, name: str, start: float, end: float, **fields: Any) -> None:
    row = {
        "request_id": name,
        "ended_at": START + end,
        "key_id": "k",
        "key": "name",
        "model": "m",
        "variant": "",
        "node": "n",
        "instance": "1",
        "path": "/v1/chat/completions",
        "status": 200,
        "secs": end - start,
        "queued_secs": 0.0,
        "cold": False,
        "complete": True,
        **fields,
    }
    async with database.writing() as connection:
        await connection.execute(USAGE.insert(), [row])


async def booked(database: Database) -> dict[tuple[str, str, str], float]:
    """Wh by model, key and kind."""
    found: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    async with database.reading() as connection:
        for row in await connection.execute(select(ENERGY)):
            found[row.model, row.key_id, row.kind] += row.wh
    return dict(found)


async def energy_of(database: Database) -> dict[str, float]:
    """`energy_wh` by request."""
    async with database.reading() as connection:
        rows = await connection.execute(select(USAGE.c.request_id, USAGE.c.energy_wh))
        return {row.request_id: row.energy_wh for row in rows}


async def settle_all(database: Database) -> None:
    more = True
    while more:
        _, more = await ledger(database).settle(START + 1e6, {}, latest=START + 1e6)


async def test_requests_residents_and_idle(database: Database) -> None:
    """What a reading counts is booked by what it was used for; the first one is where booking begins."""
    books = ledger(database)
    assert await books.read_meters([reading(0, 50.0, m=(10.0, 5.0))]) == {}
    await books.read_meters([reading(10, 56.0, m=(12.0, 6.0))])
    await add_usage(database, "a", 0, 5)
    await add_usage(database, "b", -20, 5, queued_secs=20.0, model="adapter", key_id="other")
    await settle_all(database)
    assert await booked(database) == pytest.approx(
        {
            ("", "", "idle"): 3,
            ("m", "", "resident"): 0.5,
            ("m", "k", "request"): 1.25,
            ("adapter", "other", "request"): 1.25,
        }
    )
    assert await energy_of(database) == pytest.approx({"a": 1.25, "b": 1.25})


async def test_daily_sums_are_changed_in_one_order(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests are booked: two cortexes would otherwise wait for each other in a circle."""
    monkeypatch.setattr("cortex.accounts.energy.ledger._LOOKED_UP_AT_ONCE", 1)
    changes: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO usage_days" in statement:
            changes.append(statement)

    await ledger(database).read_meters([reading(0, 0.0, m=(0.0, 0.0))])
    for key in "dcba":
        await add_usage(database, key, 0, 10, key_id=key)
    await ledger(database).read_meters([reading(10, 4.0, m=(4.0, 0.0))])
    event.listen(Engine, "before_cursor_execute", note)
    try:
        await settle_all(database)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(changes) == 1


async def test_it_waits_for_the_requests(database: Database) -> None:
    """Energy is not booked while a request of that time may still run, except after the longest wait."""
    books = ledger(database)
    await books.read_meters([reading(0, 0, m=(0, 0))])
    await books.read_meters([reading(10, 2, m=(1, 1))])
    at = ("n", "m", "1")
    for quiet in ({}, {at: START + 9.0}):
        assert await books.settle(START + 20, quiet, latest=START) == ({}, False)
    assert await books.settle(START + 9, {at: START + 11.0}, latest=START) == ({}, False)
    found, more = await books.settle(START + 20, {at: START + 11.0}, latest=START)
    assert (sum(found.values()), more) == (2, False)
    await books.read_meters([reading(20, 4, m=(2, 2))])
    found, _ = await books.settle(START + 1000, {}, latest=START + 21)
    assert sum(found.values()) == 2


async def test_two_cortexes_book_once(database: Database, source: DatabaseSource) -> None:
    """The one that comes later adds only what is new, and a reading that is older than the last one is left out."""
    other_database = await open_database(source)
    try:
        books, other = ledger(database), ledger(other_database)
        await books.read_meters([reading(0, 0)])
        await books.read_meters([reading(10, 4)])
        assert await other.read_meters([reading(8, 3)]) == {}
        assert sum((await other.read_meters([reading(11, 5)])).values()) == 1
        assert await books.read_meters([reading(10.5, 0, epoch="before")]) == {}
    finally:
        await other_database.close()
    assert await booked(database) == {("", "", "idle"): 5}


async def test_a_neuron_that_restarts(database: Database) -> None:
    """In another epoch it counts from 0; in the same one, a count that has fallen was booked already."""
    books = ledger(database)
    await books.read_meters([reading(0, 100, m=(40, 40))])
    await books.read_meters([reading(10, 3, m=(1, 1), epoch="f")])
    await settle_all(database)
    assert sum((await booked(database)).values()) == pytest.approx(3)
    assert await books.read_meters([reading(20, 2, m=(1, 0.5), epoch="f")]) == {}
    await books.read_meters([reading(30, 4, m=(1, 2), epoch="f")])
    await settle_all(database)
    assert sum((await booked(database)).values()) == pytest.approx(4)


async def test_a_clock_that_was_ahead(database: Database) -> None:
    """What is counted after it was set back is booked, in the hour that it is now."""
    books = ledger(database)
    await books.read_meters([reading(1e8, 0, m=(0, 0))])
    await books.read_meters([reading(600, 4, m=(1, 1))])
    await books.read_meters([reading(610, 8, m=(2, 2))])
    await settle_all(database)
    assert sum((await booked(database)).values()) == pytest.approx(8)
    async with database.reading() as connection:
        hours = set(await connection.scalars(select(ENERGY.c.hour)))
    assert hours == {hour_of(START)}


async def test_an_instance_that_its_neuron_no_longer_counts_is_forgotten(database: Database) -> None:
    """Or the count of each engine there ever was would be read with every reading. A reading of another device, or an
    older one, forgets nothing."""
    books = ledger(database)
    await books.read_meters([reading(0, 0, m=(1, 1))])
    await books.read_meters([MeterReading("n", "e", START + 5, {"1": 0.0}, ())])
    await books.read_meters([reading(-1, 0)])
    assert await counted(database) == {("0", ""), ("0", "m"), ("1", "")}
    await books.read_meters([reading(10, 4)])
    assert await counted(database) == {("0", ""), ("1", "")}


async def counted(database: Database) -> set[tuple[str, str]]:
    """Devices and models that have a meter."""
    async with database.reading() as connection:
        rows = await connection.execute(select(ENERGY_METERS.c.device, ENERGY_METERS.c.model))
        return {(device, model) for device, model in rows}


async def test_hours_apart(database: Database) -> None:
    """What was used while cortex was down is spread over the hours."""
    books = ledger(database)
    await books.read_meters([reading(0, 0, m=(0, 0))])
    await books.read_meters([reading(7200, 8, m=(0, 4))])
    await settle_all(database)
    async with database.reading() as connection:
        rows = [(row.hour, row.kind, row.wh) for row in await connection.execute(select(ENERGY))]
    hours = (START, START + 3600)
    assert sorted(rows) == [(hour, kind, 2) for hour in hours for kind in ("idle", "resident")]
    await books.delete_before(START + 1)
    assert sum((await booked(database)).values()) == 4


class Meter:
    """A neuron's counts, and what they have counted since the first reading."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self.epoch, self.total, self.counted = 0, 0.0, 0.0
        self.counts: dict[str, tuple[float, float]] = {}

    def use(self) -> None:
        """Uses some energy; sometimes after a restart that loses the counts, or an instance that is forgotten."""
        if self._dice.random() < 0.1:
            self.epoch, self.total, self.counts = self.epoch + 1, 0.0, {}
        elif self._dice.random() < 0.1:
            self.counts.clear()
        for model in "ab":
            if self._dice.random() < 0.6:
                more = self._dice.random(), self._dice.random()
                known = self.counts.get(model, (0.0, 0.0))
                self.counts[model] = known[0] + more[0], known[1] + more[1]
                self._add(sum(more))
        self._add(self._dice.random())

    def _add(self, wh: float) -> None:
        self.total += wh
        self.counted += wh

    def reading(self, at: float) -> MeterReading:
        counts = tuple(InstanceCount("0", model, "1", *wh) for model, wh in self.counts.items())
        return MeterReading("n", str(self.epoch), at, {"0": self.total}, counts)


@pytest.mark.parametrize("seed", range(3))
async def test_the_sums_equal_the_meter(database: Database, seed: int) -> None:
    """Over random polls, requests, restarts and settlements: requests, residents and idle add up to the meter, and the
    records of usage, and their daily sums, to the requests."""
    dice = random.Random(seed)
    meter, at = Meter(dice), START
    await ledger(database).read_meters([meter.reading(at)])
    for number in range(40):
        before = at
        at += dice.choice([1.0, 10.0, 4000.0])
        meter.use()
        await ledger(database).read_meters([meter.reading(at)])
        for each in range(dice.randrange(4)):
            end = dice.uniform(before, at) - START
            tokens = dice.choice([None, 10, 500])
            fields: Mapping[str, Any] = {"model": dice.choice("ab"), "key_id": dice.choice("xyz")}
            start = end - dice.choice([0.0, 0.5, 30.0])
            await add_usage(database, f"{number}-{each}", start, end, completion_tokens=tokens, **fields)
        if dice.random() < 0.5:
            await ledger(database).settle(at, {("n", "a", "1"): at, ("n", "b", "1"): at - 5}, latest=at - 60)
    await settle_all(database)
    found = await booked(database)
    assert sum(found.values()) == pytest.approx(meter.counted)
    requests = sum(wh for (_, _, kind), wh in found.items() if kind == "request")
    assert requests == pytest.approx(sum(wh or 0.0 for wh in (await energy_of(database)).values()))
    assert requests > 0
    async with database.reading() as connection:
        assert (await connection.execute(select(ENERGY_SLICES))).all() == []
        of_days = (await connection.execute(select(func.sum(USAGE_DAYS.c.energy_wh)))).scalar_one()
    assert of_days == pytest.approx(requests)
