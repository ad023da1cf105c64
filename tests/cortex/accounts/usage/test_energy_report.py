"""Reports of energy: sums over real databases of both kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from cortex.accounts.caller import Caller
from cortex.accounts.database.database import Database
from cortex.accounts.database.tables import API_KEYS, ENERGY, ENERGY_SLICES, USAGE
from cortex.accounts.usage.database_reports import DatabaseReports
from cortex.accounts.usage.query import ENERGY_GROUPS, EnergyQuery, parse_energy_query, seen_by
from shared.errors import InvalidRequest
from tests.cortex.accounts.usage.records import usage_record

HOUR = 1_795_996_800.0  # 2026-11-30T00:00:00Z
EVERYTHING = EnergyQuery(0, 2_000_000_000)
BOOKED = [
    (HOUR, "n1", "0", "a", "k1", "request", 5.0),
    (HOUR, "n1", "0", "a", "", "resident", 2.0),
    (HOUR, "n2", "1", "", "", "idle", 1.0),
    (HOUR + 3600, "n1", "0", "b", "file:bob", "request", 0.5),
]
KEY = {
    **{"id": "k1", "name": "alice", "digest": "d", "prefix": "", "role": "user", "models": [], "priority": 0},
    **{"weight": 1.0, "limits": {}, "created_at": 0.0, "revoked_at": 1.0, "revision": 2},
}


@pytest.fixture
async def reports(database: Database) -> DatabaseReports:
    """Some energy of two nodes, of which 0.25 Wh are not attributed yet, and the key k1, which is revoked."""
    names = [column.name for column in ENERGY.columns]
    waiting = ("n1", "0", "a", "", HOUR + 3700.0, HOUR + 3705.0, 0.15, 0.1)
    async with database.writing() as connection:
        await connection.execute(API_KEYS.insert(), [KEY])
        await connection.execute(ENERGY.insert(), [dict(zip(names, row, strict=True)) for row in BOOKED])
        await connection.execute(ENERGY_SLICES.insert().values(waiting))
    return DatabaseReports(database, lambda: 0)


async def sums(reports: DatabaseReports, *groups: str, **fields: Any) -> dict[Any, Any]:
    """Wh, about, by the values of the groups."""
    (rows,) = await reports.energy([replace(EVERYTHING, group_by=groups, **fields)])
    return {tuple(row[name] for name in groups): pytest.approx(row["energy_wh"]) for row in rows}


async def test_every_group_has_all_of_the_meter(reports: DatabaseReports) -> None:
    """What waits to be attributed is in it, and keys have their names, also revoked ones and those of a file."""
    for group in ENERGY_GROUPS:
        (rows,) = await reports.energy([replace(EVERYTHING, group_by=(group,))])
        assert sum(row["energy_wh"] for row in rows) == pytest.approx(8.75)
    assert await sums(reports, "kind") == {("idle",): 1, ("pending",): 0.25, ("request",): 5.5, ("resident",): 2}
    assert await sums(reports, "key") == {("",): 3.25, ("alice",): 5, ("bob",): 0.5}
    assert await sums(reports, "node", "device") == {("n1", "0"): 7.75, ("n2", "1"): 1}
    assert await sums(reports, "hour") == {("2026-11-30T00:00Z",): 8, ("2026-11-30T01:00Z",): 0.75}
    assert await sums(reports) == {(): 8.75}


async def test_only_what_is_asked_for_counts(reports: DatabaseReports) -> None:
    """Hours, nodes, models, kinds, keys by name or id, and the caller's own key."""
    assert await sums(reports, since=HOUR + 3600) == {(): 0.75}
    assert await sums(reports, until=HOUR + 3600) == {(): 8}
    assert await sums(reports, nodes=("n2",)) == {(): 1}
    assert await sums(reports, models=("a",), kinds=("resident", "pending")) == {(): 2.25}
    for keys in (("alice", "bob"), ("k1", "file:bob")):
        assert await sums(reports, keys=keys) == {(): 5.5}
    assert await sums(reports, key_id="file:bob") == {(): 0.5}
    assert await sums(reports, key_id="stranger") == {(): 0}


async def test_people_have_their_names(reports: DatabaseReports, database: Database) -> None:
    """A person's energy is booked under the issuer's id; the report has the name of their last request."""
    requests = [
        msgspec.structs.asdict(usage_record(key_id="oidc:7", key=name, ended_at=at))
        for name, at in (("oidc:zoe", HOUR), ("oidc:carol", HOUR + 1))
    ]
    async with database.writing() as connection:
        await connection.execute(ENERGY.insert().values((HOUR, "n1", "0", "a", "oidc:7", "request", 4.0)))
        await connection.execute(USAGE.insert(), requests)
    assert (await sums(reports, "key"))["oidc:carol",] == 4
    for name in ("oidc:carol", "oidc:7"):
        assert await sums(reports, keys=(name,)) == {(): 4}


def test_the_query_of_a_url() -> None:
    """Times are widened to full hours; a user sees itself only; errors name the parameter."""
    given = [("group_by", "node,kind"), ("from", "2026-11-30T00:30Z"), ("to", "2026-11-30T01:10Z"), ("kind", "idle")]
    asked = parse_energy_query(given, HOUR)
    assert asked == EnergyQuery(HOUR, HOUR + 7200, ("node", "kind"), kinds=("idle",))
    assert seen_by(Caller("k1", "alice"), asked).key_id == "k1"
    assert seen_by(Caller("k2", "bob", role="viewer"), asked) == asked
    for name, value in (("kind", "heat"), ("group_by", "status"), ("colour", "red")):
        with pytest.raises(InvalidRequest) as raised:
            parse_energy_query([(name, value)], HOUR)
        assert raised.value.param == name
