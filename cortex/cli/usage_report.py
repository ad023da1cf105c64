"""The answer of `/usage` as a table for people and as CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

from shared.terminal.tables import table

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


def usage_table(usage: dict[str, Any]) -> str:
    """A row for each group, and the totals. Tokens are numbers, times seconds."""
    groups, currency = usage["group_by"], usage["currency"]
    titles = [f"COST {currency}" if name == "cost" else title for name, title in _COLUMNS]
    rows = [[*(str(row[group]) or "-" for group in groups), *_cells(row)] for row in usage["rows"]] if groups else []
    total = [*(["total"] + [""] * (len(groups) - 1) if groups else []), *_cells(usage["totals"])]
    head = [*(group.upper() for group in groups), *titles]
    return table([head, *rows, total], right=set(range(len(groups), len(head))))


def _cells(row: dict[str, Any]) -> list[str]:
    return [_cell(name, row[name]) for name, _ in _COLUMNS]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("cost", "energy_cost"):
        return f"{value:.4f}"
    if name == "energy_wh":
        return f"{value:.2f}"
    return f"{value:.3f}" if name.startswith("first_byte") else str(value)


def usage_csv(usage: dict[str, Any]) -> str:
    """A line for each group, with the names of `/usage` in the first line; without a final line end."""
    rows = usage["rows"] if usage["group_by"] else [usage["totals"]]
    names = [*usage["group_by"], *(name for name, _ in _COLUMNS), "currency"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "currency": usage["currency"]} for row in rows)
    return text.getvalue().rstrip("\n")
