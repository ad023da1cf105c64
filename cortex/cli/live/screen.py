"""The fleet as a screen of `cortex top`. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
Order = Literal["name", "running", "waiting", "tokens"]
ORDERS: tuple[Order, ...] = get_args(Order)
BAR_CELLS, NARROW_BAR_CELLS = 20, 10
NARROW_CELLS = 100
"""A terminal with fewer columns gets the narrow bars."""
SILENT_SECS = 20.0
"""Longer than cortex is silent when nothing changes: it sends a sign of life every 15 s."""
_STATUS_COLOURS = {"loaded": "green", "loading": "cyan", "recovering": "yellow", "failed": "red"}


@dataclass
class _ModelRow:
    """What is known of one model over all hosts."""

    name: str
    places: list[Text] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    rate: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        return float(self.rate.get("completion_tokens_per_sec", 0.0))


def screen(
    fleet: dict[str, Any],
    *,
    problem: str | None,
    order: Order,
    now: float,
    age_secs: float = 0.0,
    width: int = NARROW_CELLS,
) -> RenderableType:
    """`fleet`: as `/fleet/events?changes=true` keeps it. `now`: Unix time. `age_secs`: since cortex sent anything.
    `width`: columns of the terminal."""
    rows = _model_rows(fleet)
    parts: list[RenderableType] = [_summary(fleet, rows)]
    if problem is not None or age_secs > SILENT_SECS:
        why = problem or "cortex does not answer"
        parts.append(Text(f"✕ {why}: what you see is {age_secs:.0f} s old", style="bold red"))
    parts += [Text(f"! {each}", style="yellow") for each in fleet.get("warnings", ())]
    if fleet["loads"]:
        parts += [Text(), _loads(fleet, now)]
    bar_cells = BAR_CELLS if width >= NARROW_CELLS else NARROW_BAR_CELLS
    return Group(*parts, Text(), _hosts(fleet, bar_cells), *_silent(fleet), Text(), _models(rows, order))


def visible(lines: list[T], *, first: int, height: int) -> tuple[list[T], int]:
    """The lines that fit into `height` from number `first` on, and the number of the first one shown."""
    first = max(0, min(first, len(lines) - height))
    return lines[first : first + height], first


def footer(order: Order, *, first: int, shown: int, total: int) -> Text:
    """The last line: the keys, and which lines are shown if not all."""
    where = f"   ↑ ↓ scroll, lines {first + 1} to {first + shown} of {total}" if shown < total else ""
    return Text(f"q quits   s sorts models, now by {order}{where}", style="dim", no_wrap=True, overflow="ellipsis")


def _summary(fleet: dict[str, Any], rows: list[_ModelRow]) -> Text:
    nodes = fleet["nodes"].values()
    healthy = sum(node["healthy"] for node in nodes)
    running, waiting = sum(row.running for row in rows), sum(row.waiting for row in rows)
    tokens = sum(row.tokens for row in rows)
    hosts = f"{healthy} of {len(nodes)} hosts healthy"
    return Text.assemble(
        (hosts, "bold" if healthy == len(nodes) else "bold red"),
        f"   {running} running   ",
        (f"{waiting} waiting", "yellow" if waiting else ""),
        f"   {tokens:.0f} tokens/s",
    )


def _hosts(fleet: dict[str, Any], bar_cells: int) -> Table:
    table = _table("HOST", "STATE", "GPU", "MEMORY", figures=("BUSY", "TEMP", "POWER"))
    table.columns[3].no_wrap = True  # nor is its figure cut
    for node in fleet["nodes"].values():
        state = _state(node)
        for device in node.get("devices", {}).values() or [None]:
            cells = [Text("-")] * 5 if device is None else _device(device, bar_cells)
            where = [Text(node["name"], style="bold"), state] if state is not None else [Text(), Text()]
            _add(table, *where, *cells)
            state = None
    return table


def _state(node: dict[str, Any]) -> Text | None:
    if not node["healthy"]:
        return Text("✕ down", style="red")
    return Text("◌ draining", style="yellow") if node["draining"] else Text("● healthy", style="green")


def _silent(fleet: dict[str, Any]) -> list[Text]:
    """Why hosts are down."""
    down = [node for node in fleet["nodes"].values() if not node["healthy"]]
    return [Text(f"✕ {node['name']}: {node.get('last_error') or 'no answer yet'}", style="red") for node in down]


def _device(device: dict[str, Any], bar_cells: int) -> list[Text]:
    wrong = device.get("lost") or device.get("fault")
    total, used = device.get("vram_total_mb") or 0, device.get("vram_used_mb") or 0
    booked = max(used, device.get("vram_booked_mb") or 0)
    full = round(bar_cells * used / total) if total else 0
    reserved = round(bar_cells * booked / total) - full if total else 0
    bar = Text.assemble(
        ("█" * full, "cyan"),
        ("▒" * max(0, reserved), "cyan"),
        ("·" * (bar_cells - full - max(0, reserved)), "dim"),
        f" {used / 1024:.0f} of {total / 1024:.0f} GiB",
    )
    name = Text(f"{device['index']} {device['name']}")
    if wrong:
        name.append(f" ✕ {wrong}", style="red")
    return [name, bar, *(Text(_number(device.get(key), unit)) for key, unit in _LIVE)]


_LIVE = (("utilization_pct", "%"), ("temp_c", "°C"), ("power_w", "W"))


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.0f} {unit}"


def _model_rows(fleet: dict[str, Any]) -> list[_ModelRow]:
    rows: defaultdict[str, _ModelRow] = defaultdict(lambda: _ModelRow(""))
    for name in fleet["models"]:
        rows[name].name = name
    for node in fleet["nodes"].values():
        for view in node.get("models", {}).values():
            if view["status"] != "unloaded":
                place = f"{node['name']} {view['status']}"
                progress = view.get("progress")
                if progress is not None and progress.get("overall") is not None:
                    place += f" {100 * progress['overall']:.0f} %"
                rows[view["id"]].places.append(Text(place, style=_STATUS_COLOURS.get(view["status"], "")))
    for each in fleet["in_flight"].values():
        rows[each["model"]].running += each["count"]
    for each in fleet["waiting"].values():
        rows[each["model"]].waiting = each["count"]
    for name, rate in fleet.get("rates", {}).items():
        rows[name].rate = rate
    for name, row in rows.items():
        row.name = name
    return list(rows.values())


def _models(rows: list[_ModelRow], order: Order) -> Table:
    table = _table("MODEL", "WHERE", figures=("RUN", "WAIT", "REQ/S", "TOKENS/S", "TTFB"))
    by: dict[Order, Any] = {
        "name": lambda row: row.name,
        "running": lambda row: (-row.running, row.name),
        "waiting": lambda row: (-row.waiting, row.name),
        "tokens": lambda row: (-row.tokens, row.name),
    }
    for row in sorted(rows, key=by[order]):
        first_byte = row.rate.get("first_byte_secs")
        _add(
            table,
            Text(row.name, style="bold"),
            Text(", ").join(row.places) if row.places else Text("-", style="dim"),
            Text(str(row.running or "-")),
            Text(str(row.waiting or "-"), style="yellow" if row.waiting else ""),
            Text(f"{row.rate['requests_per_sec']:.1f}" if row.rate else "-"),
            Text(f"{row.tokens:.0f}" if row.rate else "-"),
            Text("-" if first_byte is None else f"{first_byte:.2f} s"),
        )
    return table


def _loads(fleet: dict[str, Any], now: float) -> Table:
    table = _table("LOADING", "ON", "PHASE", "WHY", figures=("SINCE",))
    for load in fleet["loads"].values():
        displaced = f", displaces {', '.join(load['evict'])}" if load["evict"] else ""
        since = f"{max(0.0, now - load['started']):.0f} s"
        why = f"{load['because']}{displaced}"
        _add(table, *(Text(each) for each in (load["model"], load["node"], load["phase"], why, since)))
    return table


def _table(*texts: str, figures: tuple[str, ...]) -> Table:
    """Where the terminal is too narrow, texts are cut and figures are not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for name in texts:
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: Text) -> None:
    """A row of one line."""
    for cell in cells:
        cell.no_wrap, cell.overflow = True, "ellipsis"
    table.add_row(*cells)
