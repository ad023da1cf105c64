"""The phases of a load, as they stand on the wire."""

from __future__ import annotations

STARTING = "starting"
DOWNLOADING = "downloading"
LOADING = "loading weights"
COMPILING = "compiling"
CAPTURING = "capturing graphs"
WARMING_UP = "warming up"

PHASES = (STARTING, DOWNLOADING, LOADING, COMPILING, CAPTURING, WARMING_UP)
"""In their order. A load leaves out those it does not need, and never goes back to an earlier one."""

_RANKS = {phase: rank for rank, phase in enumerate(PHASES)}


def rank(phase: str) -> int:
    """The place of a phase in the order, 0 to 5. Raises KeyError for a word that is no phase."""
    return _RANKS[phase]
