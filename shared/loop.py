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
    """As asyncio.run. What requests leave behind is freed by counting: the garbage collector may look less often."""
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    if uvloop is None:
        return asyncio.run(main)
    return uvloop.run(main)


def settle() -> None:
    """For a service that is up: what is there now stays, and the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
