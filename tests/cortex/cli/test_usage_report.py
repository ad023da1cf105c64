"""What `cortex usage` prints."""

from __future__ import annotations

import csv
import io
from typing import Any

from cortex.cli.usage_report import energy_table, usage_csv, usage_table

SUMS: dict[str, Any] = {
    "requests": 3,
    "errors": 1,
    "prompt_tokens": 1000,
    "cached_tokens": 200,
    "completion_tokens": 50,
    "reasoning_tokens": 0,
    "cost": 1.23456,
    "energy_wh": 0.5,
    "energy_cost": 0.00015,
    "cold_starts": 1,
    "first_byte_secs_mean": 0.12345,
    "first_byte_secs_p95": None,
}
USAGE = {
    "object": "usage",
    "group_by": ["key", "model"],
    "currency": "EUR",
    "rows": [{"key": "alice, the first", "model": "org/a", **SUMS}, {"key": "bob", "model": "", **SUMS}],
    "totals": SUMS,
}


def test_table() -> None:
    """A line for each group and one for all; what is unknown is a dash."""
    head, alice, bob, total = usage_table(USAGE).splitlines()
    assert head.split()[:4] == ["KEY", "MODEL", "REQUESTS", "ERRORS"]
    assert "COST EUR" in head
    assert alice.split()[-6:] == ["1.2346", "0.50", "0.0001", "1", "0.123", "-"]
    assert bob.split()[:3] == ["bob", "-", "3"]
    assert total.split()[:2] == ["total", "3"]


def test_table_without_groups() -> None:
    """Only the totals."""
    head, total = usage_table({**USAGE, "group_by": [], "rows": [SUMS]}).splitlines()
    assert head.split()[0] == "REQUESTS"
    assert total.split()[:2] == ["3", "1"]


def test_csv() -> None:
    """The names are those of /usage; a comma in a name is quoted."""
    rows = list(csv.DictReader(io.StringIO(usage_csv(USAGE))))
    assert [row["key"] for row in rows] == ["alice, the first", "bob"]
    assert (rows[0]["cost"], rows[0]["first_byte_secs_p95"], rows[0]["currency"]) == ("1.23456", "", "EUR")
    (total,) = csv.DictReader(io.StringIO(usage_csv({**USAGE, "group_by": [], "rows": [SUMS]})))
    assert total["requests"] == "3"


ENERGY: dict[str, Any] = {
    "object": "energy",
    "group_by": ["node", "kind"],
    "currency": "EUR",
    "rows": [{"node": "beast", "kind": "idle", "energy_wh": 1.5, "energy_cost": 0.0006}],
    "totals": {"energy_wh": 1.5, "energy_cost": 0.0006},
    "unmetered": [
        {"node": "cpu", "device": "", "reason": "it has no GPU"},
        {"node": "old", "device": "2", "reason": "no meter"},
    ],
}


def test_energy() -> None:
    """As a table, with what has no meter below it, and as CSV."""
    head, row, total, *notes = energy_table(ENERGY).splitlines()
    assert head.split() == ["NODE", "KIND", "WH", "COST", "EUR"]
    assert (row.split(), total.split()) == (["beast", "idle", "1.50", "0.0006"], ["total", "1.50", "0.0006"])
    assert notes == ["not measured: cpu: it has no GPU", "not measured: old device 2: no meter"]
    assert usage_csv(ENERGY).splitlines() == [
        "node,kind,energy_wh,energy_cost,currency",
        "beast,idle,1.5,0.0006,EUR",
    ]
