"""The fleet as a screen of `cortex top`. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Order = Literal["name", "running", "waiting", "tokens"]
ORDERS: tuple[Order, ...] = get_args(Order)
BAR_CELLS = 20
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
    fleet: dict[str, Any], *, problem: str | None, order: Order, now: float, age_secs: float = 0.0
) -> RenderableType:
    """`fleet`: as `/fleet/events?changes=true` keeps it. `now`: Unix time. `age_secs`: since cortex sent anything."""
    rows = _model_rows(fleet)
    parts: list[RenderableType] = [_summary(fleet, rows)]
    if problem is not None or age_secs > SILENT_SECS:
        why = problem or "cortex does not answer"
        parts.append(Text(f"✕ {why}: what you see is {age_secs:.0f} s old", style="bold red"))
    parts += [Text(f"! {each}", style="yellow") for each in fleet.get("warnings", ())]
    parts += [Text(), _hosts(fleet), Text(), _models(rows, order)]
    if fleet["loads"]:
        parts += [Text(), _loads(fleet, now)]
    parts += [Text(), Text(f"q quits   s sorts models, now by {order}", style="dim")]
    return Group(*parts)


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


def _hosts(fleet: dict[str, Any]) -> Table:
    table = _table(("HOST", "left"), ("STATE", "left"), ("GPU", "left"), ("MEMORY", "left"))
    for name in ("BUSY", "TEMP", "POWER"):
        table.add_column(name, justify="right")
    for node in fleet["nodes"].values():
        state = _state(node)
        for device in node.get("devices", {}).values() or [None]:
            cells = [Text("-")] * 5 if device is None else _device(device)
            table.add_row(*(Text(node["name"], style="bold"), state) if state is not None else ("", ""), *cells)
            state = None
    return table


def _state(node: dict[str, Any]) -> Text | None:
    if not node["healthy"]:
        return Text(f"✕ down: {node.get('last_error') or 'no answer yet'}", style="red")
    return Text("◌ draining", style="yellow") if node["draining"] else Text("● healthy", style="green")


def _device(device: dict[str, Any]) -> list[Text]:
    wrong = device.get("lost") or device.get("fault")
    total, used = device.get("vram_total_mb") or 0, device.get("vram_used_mb") or 0
    booked = max(used, device.get("vram_booked_mb") or 0)
    full = round(BAR_CELLS * used / total) if total else 0
    reserved = round(BAR_CELLS * booked / total) - full if total else 0
    bar = Text.assemble(
        ("█" * full, "cyan"),
        ("▒" * max(0, reserved), "cyan"),
        ("·" * (BAR_CELLS - full - max(0, reserved)), "dim"),
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
    table = _table(("MODEL", "left"), ("WHERE", "left"))
    for name in ("RUNNING", "WAITING", "REQUESTS/S", "TOKENS/S", "FIRST BYTE"):
        table.add_column(name, justify="right")
    by: dict[Order, Any] = {
        "name": lambda row: row.name,
        "running": lambda row: (-row.running, row.name),
        "waiting": lambda row: (-row.waiting, row.name),
        "tokens": lambda row: (-row.tokens, row.name),
    }
    for row in sorted(rows, key=by[order]):
        first_byte = row.rate.get("first_byte_secs")
        table.add_row(
            Text(row.name, style="bold"),
            Text(", ").join(row.places) if row.places else Text("-", style="dim"),
            str(row.running or "-"),
            Text(str(row.waiting or "-"), style="yellow" if row.waiting else ""),
            f"{row.rate['requests_per_sec']:.1f}" if row.rate else "-",
            f"{row.tokens:.0f}" if row.rate else "-",
            "-" if first_byte is None else f"{first_byte:.2f} s",
        )
    return table


def _loads(fleet: dict[str, Any], now: float) -> Table:
    table = _table(("LOADING", "left"), ("ON", "left"), ("SINCE", "right"), ("PHASE", "left"), ("WHY", "left"))
    for load in fleet["loads"].values():
        displaced = f", displaces {', '.join(load['evict'])}" if load["evict"] else ""
        since = f"{max(0.0, now - load['started']):.0f} s"
        table.add_row(load["model"], load["node"], since, load["phase"], f"{load['because']}{displaced}")
    return table


def _table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="ellipsis", no_wrap=True)
    return table
