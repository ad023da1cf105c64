"""How a phase of an engine's life ends, and which of several ends comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from enum import Enum
from typing import Any

from shared.tasks import cancel_all


class ExitKind(Enum):
    """What ended the phase."""

    READY = "ready"  # it answers
    EXITED = "exited"  # its main process ended by itself
    STOPPED = "stopped"  # it was asked to stop
    TIMED_OUT = "timed out"
    UNHEALTHY = "unhealthy"  # its process runs, and it does not do its work
    WISHED = "wished"  # something else is wanted of it


async def first_of(
    alternatives: Mapping[ExitKind, Coroutine[Any, Any, Any]], *, timeout_secs: float | None = None
) -> ExitKind:
    """What happened first, in case of doubt the one named first; TIMED_OUT when nothing did in time.

    The others are cancelled, and gone when this returns. Raises what the first one raised.
    """
    tasks = {asyncio.create_task(work): ending for ending, work in alternatives.items()}
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_secs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all(list(tasks))
    for task, ending in tasks.items():
        if task in done:
            task.result()
            return ending
    return ExitKind.TIMED_OUT
