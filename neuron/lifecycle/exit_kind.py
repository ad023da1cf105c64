"""How a phase of an engine's life ends."""

from __future__ import annotations

from enum import Enum


class ExitKind(Enum):
    """What ended the phase."""

    READY = "ready"  # it answers
    EXITED = "exited"  # its main process ended by itself
    STOPPED = "stopped"  # it was asked to stop
    TIMED_OUT = "timed out"
    UNHEALTHY = "unhealthy"  # its process runs, and it does not do its work
    SLEEP_REQUESTED = "sleep requested"  # something else is wanted of it
