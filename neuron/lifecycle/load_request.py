"""One load request, from acceptance until its memory is released."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from neuron.memory.ledger import EnginePlacement
from neuron.spec import EngineSpec
from shared.errors import ServiceError


@dataclass
class SleepRequest:
    """Asks a running engine to sleep, or to wake up (`level` 0). `done` gets the outcome."""

    level: int
    done: asyncio.Future[ServiceError | None]

    def settle(self, error: ServiceError | None) -> None:
        if not self.done.done():
            self.done.set_result(error)

    async def fulfilled(self) -> None:
        """Waits for the outcome. Raises ServiceError if it failed."""
        error = await asyncio.shield(self.done)
        if error is not None:
            raise error


class LoadRequest:
    """Shared by all callers that wait for the model. Changed only by the model's supervisor and its engine life.

    The outcome is a value, not an exception: an exception that no caller is left to receive would be reported as lost.
    """

    def __init__(self, spec: EngineSpec, placement: EnginePlacement, *, carries_keys: bool) -> None:
        self.spec = spec
        self.carries_keys = carries_keys
        """The caller can send a key to the engine."""
        self.placement = placement
        self.stop_requested = asyncio.Event()
        self.stop_reason: ServiceError | None = None
        self.drain_until = 0.0
        """Monotonic time until which running requests may continue after a stop."""
        self.leave_engine = False
        """Leave the engine running when this load request ends."""
        self.vram_error: ServiceError | None = None
        self.adapters: dict[str, str] = {}
        """The LoRA adapters of its engine, and of the next one after a crash: `Engine.adapters`."""
        self.sleep_requests: deque[SleepRequest] = deque()
        self.sleep_requested = asyncio.Event()
        """Set while sleep requests are pending."""
        self._outcome = self._new_outcome()
        self._gone = asyncio.Event()

    @property
    def joinable(self) -> bool:
        return not self.stop_requested.is_set()

    async def loaded(self) -> None:
        """Returns when the model is loaded. Cancelling this does not cancel the load.

        Raises:
            ServiceError: the load failed.
        """
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error

    async def gone(self) -> None:
        """Returns when its processes are gone and their memory is released.

        Raises:
            VramNotReleased: the processes are gone, but the driver still counts their memory.
        """
        await self._gone.wait()
        if self.vram_error is not None:
            raise self.vram_error

    def stop(self, reason: ServiceError, *, drain_secs: float = 0) -> None:
        """Requests its end. Callers that wait for the load get `reason` at once; running requests get `drain_secs` to
        finish. If called again, the earlier deadline counts."""
        until = time.monotonic() + drain_secs
        if not self.stop_requested.is_set():
            self.stop_reason = reason
            self.drain_until = until
            self.stop_requested.set()
        self.drain_until = min(self.drain_until, until)
        self.settle(reason)

    def sleep_request(self, level: int) -> SleepRequest:
        """Asks its engine to sleep or to wake up; await `SleepRequest.fulfilled`."""
        sleep_request = SleepRequest(level, asyncio.get_running_loop().create_future())
        self.sleep_requests.append(sleep_request)
        self.sleep_requested.set()
        return sleep_request

    def reopen(self) -> None:
        """Makes callers wait for the next outcome: the model is not loaded now."""
        if self._outcome.done() and not self.stop_requested.is_set():
            self._outcome = self._new_outcome()

    def settle(self, error: ServiceError | None) -> None:
        """Sets the outcome for waiting callers. Only the first call counts."""
        if not self._outcome.done():
            self._outcome.set_result(error)

    def finish(self) -> None:
        reason = self.stop_reason or ServiceError("the engine is gone")
        while self.sleep_requests:
            self.sleep_requests.popleft().settle(reason)
        self._gone.set()

    @staticmethod
    def _new_outcome() -> asyncio.Future[ServiceError | None]:
        return asyncio.get_running_loop().create_future()
