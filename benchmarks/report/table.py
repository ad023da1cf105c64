"""The results as Markdown tables."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import BASE, Results


@dataclass(frozen=True)
class Column:
    """A column of the table. `compared`: the ratio to nginx follows the figure in brackets."""

    head: str
    case: str
    figure: str
    form: str = "{:.1f}"
    compared: bool = True


COLUMNS = (
    Column("µs CPU / plain request, c=32", "plain", "cpu_us"),
    Column("µs CPU / plain request, paced", "paced", "cpu_us"),
    Column("µs CPU / chunk, 200 streams", "stream200", "cpu_us"),
    Column("µs CPU / chunk, 1000 streams", "stream1000", "cpu_us"),
    Column("added TTFB p50, µs", "ttfb", "added_p50_us", "{:.0f}"),
    Column("added TTFB p99, µs", "ttfb", "added_p99_us", "{:.0f}"),
    Column("requests/s, c=64", "saturation", "per_second", "{:,.0f}", compared=False),
    Column("KiB / open stream", "idle8000", "kib_per_stream"),
    Column("ms CPU / 10 MB prompt", "prompt10m", "cpu_ms"),
    Column("ms CPU / 1 MB answer", "answer1m", "cpu_ms", "{:.2f}"),
    Column("RSS at 1000 streams, MiB", "stream1000", "peak_rss_mib", "{:.0f}", compared=False),
)


def table(results: Results) -> str:
    """A row for each gateway, a column for each measured case, the ratio to nginx in brackets."""
    columns = [column for column in COLUMNS if column.case in results.cells]
    lines = [
        "| gateway | " + " | ".join(column.head for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, contender in results.contenders.items():
        title = f"{contender['title']} {contender['version']}".strip()
        bold = f"**{title}**" if name.startswith("cortex") else title
        cells = [_cell(results, column, name) for column in columns]
        lines.append(f"| {bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(results: Results, column: Column, name: str) -> str:
    value = results.figure(column.case, name, column.figure)
    cell = results.find(column.case, name)
    failed = bool(cell and cell.faults)
    if value is None:
        return "failed" if failed else "-"
    text = column.form.format(value)
    ratio = results.ratio(column.case, name, column.figure)
    if column.compared and ratio is not None and name != BASE:
        text += f" ({ratio:.2f}x)"
    return text + (" ⚠" if failed else "")


def spreads(results: Results) -> str:
    """The spread of the rounds, and every fault."""
    lines = ["| case | gateway | median | min - max | faults |", "|---|---|---:|---:|---|"]
    for case, cells in results.cells.items():
        figure = _key(case)
        for name, cell in cells.items():
            spread, middle = cell.spread(figure), cell.median(figure)
            shown = "-" if spread is None else f"{spread[0]:.4g} - {spread[1]:.4g}"
            faults = "; ".join(f"{count} x {fault}" for fault, count in cell.faults.items()) or "none"
            faults = faults.replace("|", "/")
            lines.append(f"| {case} | {name} | {'-' if middle is None else f'{middle:.4g}'} | {shown} | {faults} |")
    return "\n".join(lines)


def _key(case: str) -> str:
    return next((column.figure for column in COLUMNS if column.case == case), "cpu_us")
