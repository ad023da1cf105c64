"""Reports of a benchmark run: table, targets, plot. Called by `benchmarks.__main__`."""

from __future__ import annotations

from pathlib import Path


def plot_path() -> Path:
    """The plot script. It runs as a process of its own because it needs matplotlib."""
    return Path(__file__).with_name("plot.py")
