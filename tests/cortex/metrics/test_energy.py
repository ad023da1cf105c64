"""Energy from the simulated GPUs of a neuron to the records of requests, with real processes."""

from __future__ import annotations

import contextlib
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cortex.fleet.snapshot import NodeSnapshot
from cortex.metrics.energy import unmetered
from shared.protocol import Device, DeviceHealth, Discovery, NeuronHealth
from tests.processes import eventually
from tests.services import NODE, Service, running_fleet

METER = "SELECT resident_wh FROM energy_meters WHERE model = ''"
BOOKED = "SELECT coalesce(sum(wh), 0) FROM energy"
WAITING = "SELECT coalesce(sum(active_wh + resident_wh), 0) FROM energy_slices"
OF_REQUESTS = "SELECT coalesce(sum(wh), 0) FROM energy WHERE kind = 'request' AND model = 'm' AND key_id = ''"
OF_RECORDS = "SELECT coalesce(sum(energy_wh), 0) FROM usage"
SETTLED = """
SELECT (SELECT min(read_at) FROM energy_meters) > ended_at
    AND NOT EXISTS (SELECT 1 FROM energy_slices WHERE energy_slices.started_at < usage.ended_at) FROM usage
"""
RESIDENT = "SELECT coalesce(sum(wh), 0) FROM energy WHERE kind = 'resident' AND model = 'm'"
IDLE = "SELECT coalesce(sum(wh), 0) FROM energy WHERE kind = 'idle' AND model = ''"
ROUNDING = 1e-9
"""Sums of the same figures in another order differ by this share of them."""


def values(database: Path, *queries: str) -> list[float]:
    """One value of each, all of the same moment; 0 without a row."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        found = [connection.execute(query).fetchone() for query in queries]
    return [0.0 if row is None else float(row[0]) for row in found]


def reported(cortex: Service, group_by: str) -> Any:
    answer = cortex.request(f"/usage/energy?group_by={group_by}")
    assert answer.status == 200
    return answer.body


def test_energy_of_a_request(tmp_path: Path) -> None:
    """A request gets energy in its record; that and what no request used add up to the meter."""
    neuron = {
        "harnesses": [{"name": "sim"}],
        "harness": {"sim": {"extra_args": ["--load-secs", "0.2", "--tokens-per-sec", "20"]}},
        "simulate": {"devices": ["RTX 4090"]},
    }
    cortex = {"state_dir": str(tmp_path / "cortex"), "poll": {"interval_secs": 0.5}, "energy": {"price_per_kwh": 500.0}}
    database = tmp_path / "cortex" / "cortex.db"
    with running_fleet(tmp_path, neuron, cortex, {"models": [{"id": "m", "harness": "sim"}]}) as fleet:
        eventually(lambda: values(database, IDLE)[0] > 0, "the meter is read twice", within_secs=60)
        before, booked, waiting = values(database, METER, BOOKED, WAITING)
        body = {"model": "m", "max_tokens": 60, "messages": [{"role": "user", "content": "hello"}]}
        assert fleet.cortex.request("/v1/chat/completions", body).status == 200
        eventually(lambda: values(database, SETTLED)[0] > 0, "all energy of its time is booked", within_secs=60)
        eventually(lambda: values(database, RESIDENT)[0] > 0, "the loaded engine has energy", within_secs=60)
        of_requests, of_records = values(database, OF_REQUESTS, OF_RECORDS)
        assert of_records == pytest.approx(of_requests)
        assert of_records > 0
        (row,) = fleet.cortex.request("/usage?group_by=model").body["rows"]
        assert row["energy_wh"] == pytest.approx(of_records)
        assert row["energy_cost"] == pytest.approx(of_records / 2)
        after, now_booked, now_waiting = values(database, METER, BOOKED, WAITING)
        assert now_booked - booked + now_waiting - waiting == pytest.approx(after - before, abs=1e-6)
        assert after > before
        seen, counted, rest = reported(fleet.cortex, "kind,node,device"), *values(database, BOOKED, WAITING)
        assert {row["kind"] for row in seen["rows"]} >= {"request", "resident", "idle"}
        assert {(row["node"], row["device"]) for row in seen["rows"]} == {(NODE, "0")}
        assert seen["totals"]["energy_wh"] == pytest.approx(sum(row["energy_wh"] for row in seen["rows"]))
        assert now_booked + now_waiting <= seen["totals"]["energy_wh"] * (1 + ROUNDING)
        assert seen["totals"]["energy_wh"] <= (counted + rest) * (1 + ROUNDING)
        assert seen["totals"]["energy_cost"] == pytest.approx(seen["totals"]["energy_wh"] / 2)
        assert seen["unmetered"] == []
        config = (tmp_path / "cortex.toml").read_text()
        address = config.partition('metrics_listen = "')[2].partition('"')[0]
        with urllib.request.urlopen(f"http://{address}/metrics") as response:
            assert 'cortex_energy_wh_total{kind="request",model="m"}' in response.read().decode()


def test_what_has_no_meter_is_said() -> None:
    """A host without GPUs, an older neuron, a silent one, and single devices; a MIG instance has its GPU's."""
    gpus = [Device(index=0, mig_mode=True), Device(index=1, kind="mig", parent=0), Device(index=2)]
    counting = DeviceHealth(index=0, energy_wh=1.0)

    def node(name: str, devices: list[Device], *health: DeviceHealth, epoch: str | None = "e") -> NodeSnapshot:
        return NodeSnapshot(
            name,
            "http://n",
            discovery=Discovery(hostname=name, devices=devices),
            health=NeuronHealth(devices=list(health), energy_epoch=epoch),
        )

    nodes = [
        node("all", gpus[:2], counting, DeviceHealth(index=1)),
        node("some", gpus, counting, DeviceHealth(index=1), DeviceHealth(index=2)),
        node("cpu", []),
        node("old", gpus, DeviceHealth(index=0), epoch=None),
        NodeSnapshot("silent", "http://n"),
    ]
    assert [(each["node"], each["device"]) for each in unmetered(nodes)] == [
        ("some", "2"),
        ("cpu", ""),
        ("old", ""),
        ("silent", ""),
    ]
