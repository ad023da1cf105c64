"""The event loop of everything in here: uvloop where it exists, asyncio's own elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:
    LOOP_NAME = "asyncio"
else:
    LOOP_NAME = "uvloop"

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Like asyncio.run, on that loop."""
    loop = uvloop.new_event_loop() if LOOP_NAME == "uvloop" else asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
