"""One wish to have a model loaded, from the moment it is taken on until nothing of it is left."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from neuron.spec import EngineSpec
from shared.errors import ServiceError
from shared.protocol import Device


@dataclass(frozen=True)
class Placement:
    """Where a run's engines are: the devices, the MiB booked on each of them under `number`, and why these. `share_mb`
    is what an engine is told to take on each, None when it takes what it takes by default."""

    number: int
    devices: tuple[Device, ...] = ()
    booked_mb: tuple[int, ...] = ()
    share_mb: int | None = None
    why: str = ""

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(device.index for device in self.devices)


@dataclass
class Wish:
    """Something that is wanted of an engine that is there: sleep, or wake up (`level` 0). `done` is its outcome."""

    level: int
    done: asyncio.Future[ServiceError | None]

    def settle(self, error: ServiceError | None) -> None:
        if not self.done.done():
            self.done.set_result(error)

    async def fulfilled(self) -> None:
        """Raises ServiceError: why it was not."""
        error = await asyncio.shield(self.done)
        if error is not None:
            raise error


class LoadRequest:
    """Shared by everybody who asks for the model meanwhile. Only its worker changes it.

    An outcome is a value and not an exception, since there may be nobody to be told of it.
    """

    def __init__(self, spec: EngineSpec, placement: Placement) -> None:
        self.spec = spec
        self.placement = placement
        self.stop_wanted = asyncio.Event()
        self.stop_reason: ServiceError | None = None
        self.drain_until = 0.0
        """Monotonic time until which running requests may go on after a stop is wanted."""
        self.leave_engine = False
        """The engine is to be left running when this run ends."""
        self.vram_error: ServiceError | None = None
        self.wishes: deque[Wish] = deque()
        self.wished = asyncio.Event()
        """Set while there are wishes that nobody has begun with."""
        self._outcome = self._new_outcome()
        self._gone = asyncio.Event()

    @property
    def joinable(self) -> bool:
        return not self.stop_wanted.is_set()

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

    def stop(self, reason: ServiceError, *, drain_secs: float = 0) -> None:
        """Asks for its end; `reason` is what those who wait for the load are told, at once. What the engine works on
        has `drain_secs`; asked again, the shorter time counts."""
        until = time.monotonic() + drain_secs
        if not self.stop_wanted.is_set():
            self.stop_reason = reason
            self.drain_until = until
            self.stop_wanted.set()
        self.drain_until = min(self.drain_until, until)
        self.settle(reason)

    def wish(self, level: int) -> Wish:
        """Asks its engine to sleep or to wake up; the wish's `done` tells how that went."""
        wish = Wish(level, asyncio.get_running_loop().create_future())
        self.wishes.append(wish)
        self.wished.set()
        return wish

    def reopen(self) -> None:
        """The model is not there any more, or not yet again: who asks from now on waits for the next outcome."""
        if self._outcome.done() and not self.stop_wanted.is_set():
            self._outcome = self._new_outcome()

    def settle(self, error: ServiceError | None) -> None:
        """Tells the waiting how the load ended; what was told first stands."""
        if not self._outcome.done():
            self._outcome.set_result(error)

    def finish(self) -> None:
        reason = self.stop_reason or ServiceError("the engine is gone")
        while self.wishes:
            self.wishes.popleft().settle(reason)
        self._gone.set()

    @staticmethod
    def _new_outcome() -> asyncio.Future[ServiceError | None]:
        return asyncio.get_running_loop().create_future()
