"""A worker's view of the limits, which the control owns, at the other end of its channel."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from typing import Any

from cortex.accounts.caller import Caller
from cortex.accounts.limits.terms import Grant, TokenBound
from cortex.http.errors import shutting_down
from cortex.workers.messages import Admit, AdmitRefused, Admitted, Settle, error_from_wire


class RemoteLimiter:
    """Implements `accounts.limits.limiter.Limiter`."""

    def __init__(self, limited_models: Collection[str], send: Callable[[Any], None]) -> None:
        self.limited_models: Collection[str] = frozenset(limited_models)
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Grant]] = {}
        self._gone = False

    def admit(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant | None:
        """Always None: only the control knows what the other workers have admitted."""
        return None

    async def admission(self, caller: Caller, model_id: str, bound: TokenBound) -> Grant:
        if self._gone:
            raise shutting_down()
        number = next(self._numbers)
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._send(Admit(number, caller, model_id, bound))
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.settle(future.result(), 0, 0, 0)  # it came just before
            raise
        finally:
            del self._waiting[number]

    def settle(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        if grant.number:
            self._send(Settle(grant, prompt, completion, cached))

    def settle_estimate(self, grant: Grant, prompt: int, completion: int, cached: int) -> None:
        if grant.number:
            self._send(Settle(grant, prompt, completion, cached, estimated=True))

    def receive(self, message: Admitted | AdmitRefused) -> None:
        """Applies an answer of the control."""
        future = self._waiting.get(message.number)
        if future is None or future.done():
            if isinstance(message, Admitted):
                self.settle(message.grant, 0, 0, 0)  # the request has ended
        elif isinstance(message, Admitted):
            future.set_result(message.grant)
        else:
            future.set_exception(error_from_wire(message))

    def lost(self) -> None:
        """The control is gone: fails all that wait, and later ones."""
        self._gone = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(shutting_down())
