"""The event loop that services run on: uvloop's where it is installed, asyncio's own elsewhere."""

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
"""Containers made and not freed before the youngest are looked at."""

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As asyncio.run. What exists by now stays: the garbage collector need not look at it again and again, and what
    requests leave behind is no garbage of its kind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    if uvloop is None:
        return asyncio.run(main)
    return uvloop.run(main)
