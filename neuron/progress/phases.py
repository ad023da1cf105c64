"""The phases of a load, as the protocol names them, and where a load stands among them. Pure."""

from __future__ import annotations

from typing import Protocol

STARTING = "starting"
DOWNLOADING = "downloading"
LOADING = "loading weights"
COMPILING = "compiling"
CAPTURING = "capturing graphs"
WARMING_UP = "warming up"

PHASES = (STARTING, DOWNLOADING, LOADING, COMPILING, CAPTURING, WARMING_UP)
"""In order. A load skips phases it does not need and never returns to an earlier one."""

_RANKS = {phase: rank for rank, phase in enumerate(PHASES)}


def rank(phase: str) -> int:
    """Position of a phase in the order, 0 to 5. Raises KeyError for an unknown phase."""
    return _RANKS[phase]


class LoadReading(Protocol):
    """What an engine's output says about its start so far. Immutable: `after` returns the next reading."""

    @property
    def phase(self) -> str:
        """One of `PHASES`; never goes back."""
        ...

    @property
    def fraction(self) -> float | None:
        """Of the phase, 0 to 1; never falls within it. None when the engine does not say."""
        ...

    @property
    def message(self) -> str | None:
        """The line of output that said so."""
        ...

    @property
    def serving(self) -> bool:
        """The engine says that it answers now or in a moment: check its health at once."""
        ...

    @property
    def downloaded_secs(self) -> float | None:
        """Duration of the download, for an engine that reports it afterwards."""
        ...

    def after(self, line: str) -> LoadReading:
        """The reading after one more line of output."""
        ...
