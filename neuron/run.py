"""One wish to have a model loaded, from the moment it is taken on until nothing of it is left."""

from __future__ import annotations

import asyncio

from neuron.spec import EngineSpec
from shared.errors import ServiceError


class Run:
    """Shared by everybody who asks for the model meanwhile. Only its worker changes it.

    The outcome is a value and not an exception, since there may be nobody to be told of it.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.stop_wanted = asyncio.Event()
        self.stop_reason: ServiceError | None = None
        self.engine_lost = False
        """Its engine ended by itself after it was loaded: nobody can join it any more."""
        self.vram_error: ServiceError | None = None
        self._outcome: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()

    @property
    def joinable(self) -> bool:
        return not self.stop_wanted.is_set() and not self.engine_lost

    async def loaded(self) -> None:
        """Returns when the model is loaded. A caller that is cancelled here cancels nothing else.

        Raises:
            ServiceError: why it is not.
        """
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error

    async def gone(self) -> None:
        """Returns when its processes are gone and their memory is back.

        Raises:
            VramNotReleased: the processes are gone, the memory is not back.
        """
        await self._gone.wait()
        if self.vram_error is not None:
            raise self.vram_error

    def stop(self, reason: ServiceError) -> None:
        """Asks for its end; `reason` is what those who wait for the load are told, at once."""
        if not self.stop_wanted.is_set():
            self.stop_reason = reason
            self.stop_wanted.set()
        self.settle(reason)

    def settle(self, error: ServiceError | None) -> None:
        """Tells the waiting how the load ended; what was told first stands."""
        if not self._outcome.done():
            self._outcome.set_result(error)

    def finish(self) -> None:
        self._gone.set()
