"""The event loop of the services: uvloop if installed, otherwise asyncio's."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

GC_THRESHOLD = 10_000
"""Allocations minus deallocations of container objects that start a collection of the youngest generation."""

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Like asyncio.run, with a rarer garbage collection: reference counting frees what requests leave behind."""
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    if uvloop is None:
        return asyncio.run(main)
    return uvloop.run(main)


def settle() -> None:
    """Call once the service is up: excludes the objects of the start-up from garbage collection."""
    gc.collect()
    gc.freeze()
