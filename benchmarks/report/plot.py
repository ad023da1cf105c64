"""Draws the plot: `python plot.py RESULTS.json PICTURE.png`, in any Python with matplotlib, without project code."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

PANELS = (
    ("plain", "cpu_us", "µs CPU per plain request (c=32)"),
    ("stream200", "cpu_us", "µs CPU per chunk, 200 streams"),
    ("stream1000", "cpu_us", "µs CPU per chunk, 1000 streams"),
    ("ttfb", "added_p99_us", "added time to first byte, p99, µs"),
    ("saturation", "per_second", "plain requests/s (c=64)"),
    ("idle8000", "kib_per_stream", "KiB RSS per open stream"),
)
OMITTED = {"direct"}
OURS, FLOOR, OTHERS = "#d1495b", "#8d99ae", "#30638e"
OFF_SCALE = 3
"""Bars longer than this many times the median are cut, or one slow gateway would flatten the rest."""


def main() -> int:
    """Draws one panel for each measured case. Exit status 1 when there is none."""
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    panels = [panel for panel in PANELS if panel[0] in results["cases"]]
    if not panels:
        return 1
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    importlib.import_module("matplotlib").use("Agg")  # imported by name: type checking does not need it
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.1 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, name, title) in zip(axes.flat, panels, strict=False):
        _panel(axis, results["cases"][case], name, title)
    machine = results["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}, {machine['date']}, {machine['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)
    return 0


def _panel(axis: Any, cells: dict[str, Any], name: str, title: str) -> None:
    bars = [(gateway, cell) for gateway, cell in cells.items() if gateway not in OMITTED and name in cell["median"]][
        ::-1
    ]
    values = [cell["median"][name] for _, cell in bars]
    limit = sorted(values)[len(values) // 2] * OFF_SCALE if values else 0
    shown = [min(value, limit) for value in values]
    spread = [[figures[name] for figures in cell["rounds"] if name in figures] for _, cell in bars]
    errors = [
        [max(0.0, value - min(each)) if value <= limit else 0 for value, each in zip(values, spread, strict=True)],
        [max(0.0, max(each) - value) if value <= limit else 0 for value, each in zip(values, spread, strict=True)],
    ]
    colours = [OURS if name.startswith("cortex") else FLOOR if name == "nginx" else OTHERS for name, _ in bars]
    several = any(len(each) > 1 for each in spread)
    style = {"xerr": errors, "error_kw": {"lw": 0.8, "capsize": 2}} if several else {}
    axis.barh([gateway for gateway, _ in bars], shown, color=colours, **style)
    for at, (value, length) in enumerate(zip(values, shown, strict=True)):
        label = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        axis.text(length, at, f" {label}{' (cut)' if value > length else ''}", va="center", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(x=0.22)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
