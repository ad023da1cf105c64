"""What a run found: a table, the bars of acceptance, a plot."""

from __future__ import annotations

from pathlib import Path


def plot_path() -> Path:
    """The script that draws; never imported, since it needs what we do not have."""
    return Path(__file__).with_name("plot.py")
