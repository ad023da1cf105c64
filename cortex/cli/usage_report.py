"""The answers of `/usage` and `/usage/energy` as a table for people and as CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

from shared.terminal.tables import table

_Columns: TypeAlias = Sequence[tuple[str, str]]
"""Names in the answer, and titles."""

_COLUMNS = (
    ("requests", "REQUESTS"),
    ("errors", "ERRORS"),
    ("prompt_tokens", "PROMPT"),
    ("cached_tokens", "CACHED"),
    ("completion_tokens", "COMPLETION"),
    ("reasoning_tokens", "REASONING"),
    ("cost", "COST"),
    ("energy_wh", "WH"),
    ("energy_cost", "WH COST"),
    ("cold_starts", "COLD"),
    ("first_byte_secs_mean", "FIRST BYTE"),
    ("first_byte_secs_p95", "P95"),
)
_ENERGY_COLUMNS = (("energy_wh", "WH"), ("energy_cost", "COST"))


def energy_table(energy: dict[str, Any]) -> str:
    """The answer of `/usage/energy`: a row for each group, the totals, and what has no meter."""
    notes = [
        f"not measured: {each['node']}{each['device'] and ' device ' + each['device']}: {each['reason']}"
        for each in energy["unmetered"]
    ]
    return "\n".join([_table(energy, _ENERGY_COLUMNS, {"energy_cost"}), *notes])


def usage_table(usage: dict[str, Any]) -> str:
    """The answer of `/usage`: a row for each group, and the totals. Tokens are numbers, times seconds."""
    return "\n".join([_table(usage, _COLUMNS, {"cost"}), *(f"warning: {each}" for each in usage.get("warnings", ()))])


def _table(report: dict[str, Any], columns: _Columns, in_currency: Collection[str]) -> str:
    groups = report["group_by"]
    titles = [f"{title} {report['currency']}" if name in in_currency else title for name, title in columns]
    rows = [[*(str(row[group]) or "-" for group in groups), *_cells(row, columns)] for row in report["rows"]]
    total = [*(["total"] + [""] * (len(groups) - 1) if groups else []), *_cells(report["totals"], columns)]
    head = [*(group.upper() for group in groups), *titles]
    return table([head, *(rows if groups else ()), total], right=set(range(len(groups), len(head))))


def _cells(row: dict[str, Any], columns: _Columns) -> list[str]:
    return [_cell(name, row[name]) for name, _ in columns]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("cost", "energy_cost"):
        return f"{value:.4f}"
    if name == "energy_wh":
        return f"{value:.2f}"
    return f"{value:.3f}" if name.startswith("first_byte") else str(value)


def usage_csv(usage: dict[str, Any]) -> str:
    """The answer of `/usage` or `/usage/energy`: a line for each group, with its names in the first line; without a
    final line end."""
    columns = _ENERGY_COLUMNS if usage["object"] == "energy" else _COLUMNS
    rows = usage["rows"] if usage["group_by"] else [usage["totals"]]
    names = [*usage["group_by"], *(name for name, _ in columns), "currency"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "currency": usage["currency"]} for row in rows)
    return text.getvalue().rstrip("\n")
