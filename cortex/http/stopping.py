"""The end of cortex, as those see it who wait for something that may outlast it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shared.errors import Unavailable
from shared.tasks import first_of

Result = TypeVar("Result")

RETRY_AFTER_SECS = 5
"""When to come back: about what a restart takes; another cortex behind the same balancer can be asked at once."""


class Stopping:
    """Begins once. What is sent to an engine by then is finished; what still waits for a model is refused, since a load
    takes longer than the time that there is."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        if not self.begun:
            self._begun.set()
            for listener in self._listeners:
                listener()

    def on_begin(self, listener: Callable[[], None]) -> None:
        """Calls `listener` at the beginning."""
        self._listeners.append(listener)

    async def unless_begun(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled when cortex begins to stop, or the caller is.

        Raises:
            Unavailable: cortex is stopping.
        """
        if self.begun:
            work.close()
            raise stopping()
        working = asyncio.ensure_future(work)
        if await first_of({"work": working, "stop": self._begun.wait()}) == "stop":
            raise stopping()
        return working.result()


def stopping() -> Unavailable:
    """The error for whoever is not served any more."""
    return Unavailable(
        "cortex is stopping; a load that has begun goes on", code="cortex_stopping", retry_after=RETRY_AFTER_SECS
    )
