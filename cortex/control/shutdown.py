"""The shutdown of cortex: ends waits that would outlast the drain timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from cortex.http.errors import shutting_down
from shared.subscribers import Subscribers
from shared.tasks import first_of

Result = TypeVar("Result")


class Shutdown:
    """Begins once. Requests at an engine finish; those that still wait for a model are refused, because a load takes
    longer than the drain timeout."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self.beginning: Subscribers[[]] = Subscribers()
        """Announces that the shutdown begins."""

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        if not self.begun:
            self._begun.set()
            self.beginning.announce()

    async def unless_begun(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled if the shutdown begins or the caller is cancelled.

        Raises:
            Unavailable: cortex shuts down.
        """
        if self.begun:
            work.close()
            raise shutting_down()
        working = asyncio.ensure_future(work)
        if await first_of({"work": working, "stop": self._begun.wait()}) == "stop":
            raise shutting_down()
        return working.result()
