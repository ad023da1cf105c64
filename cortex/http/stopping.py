"""The shutdown of cortex: ends waits that would outlast the drain timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from cortex.subscribers import Subscribers
from shared.errors import Unavailable
from shared.protocol import ErrorCode
from shared.retry_after import SERVICE_STOPPING_SECS
from shared.tasks import first_of

Result = TypeVar("Result")


class Stopping:
    """Begins once. Requests at an engine finish; those that still wait for a model are refused, because a load takes
    longer than the drain timeout."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self.beginning: Subscribers[[]] = Subscribers()
        """Announces that stopping begins."""

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        if not self.begun:
            self._begun.set()
            self.beginning.announce()

    async def unless_begun(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled if stopping begins or the caller is cancelled.

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
    """The error for requests refused during shutdown."""
    return Unavailable(
        "cortex is stopping; a load that has started continues",
        code=ErrorCode.CORTEX_STOPPING,
        retry_after=SERVICE_STOPPING_SECS,
    )
