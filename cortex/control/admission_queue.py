"""The admission queue: requests that wait for a model that cannot serve yet, or has as many requests as it may. Bounded
per model and in total. The callers take turns (`cortex.accounts.fairness.turns`)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.fairness.turns import Turns
from cortex.config.live import LiveConfig
from cortex.placement.inputs import WaitingRequests
from shared.errors import ServiceError, TooManyRequests
from shared.protocol import ErrorCode
from shared.request_ids import current_request_id
from shared.tasks import timeout


class Ticket:
    """One waiting request. A notification that arrives while it does not wait is kept. `in_line`: it waits for the
    model or for a place at an engine, not for something that others do not need."""

    def __init__(self, model_id: str, caller: Caller, turns: Turns[Ticket]) -> None:
        self.model_id = model_id
        self.caller = caller
        self.request_id = current_request_id()
        self.in_line = True
        self.admitted = False
        self.names: tuple[str, ...] = (model_id,)
        """What the engine serves that has the place that it was last woken for."""
        self._turns = turns
        self._event = asyncio.Event()
        self._error: ServiceError | None = None

    async def wait(self, *, within_secs: float) -> None:
        """Returns when something has changed for the model.

        Raises:
            ServiceError: it cannot be served. asyncio.TimeoutError: nothing changed within that time.
        """
        async with timeout(within_secs):
            await self._event.wait()
        self._event.clear()
        self._turns.put_back(self)
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def notified(self) -> bool:
        """Whether a notification is waiting for it."""
        return self._event.is_set()

    def notify(self, error: ServiceError | None = None) -> None:
        self._error = error
        self._event.set()


@dataclass
class _ModelQueue:
    """Those that wait for a model by one name, in order of arrival. `turns` has those of all its names, each in the
    line of its name."""

    since: float
    turns: Turns[Ticket]
    tickets: dict[Ticket, None] = field(default_factory=dict)
    admitted_at: float = -math.inf


class AdmissionQueue:
    """Owns all tickets. Times are those of `clock`."""

    def __init__(self, *, live: LiveConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = live
        self._clock = clock
        self._queues: dict[str, _ModelQueue] = {}
        self._turns: dict[str, Turns[Ticket]] = {}  # by model id
        self._served_at: dict[str, float] = {}  # by key id
        self._total = 0

    @contextlib.contextmanager
    def ticket(
        self, model_id: str, retry_after: Callable[[str], float], caller: Caller = ANONYMOUS, tokens: float = 0.0
    ) -> Iterator[Ticket]:
        """A ticket for the duration of the body. `retry_after` estimates the seconds until the model is loaded, for the
        error. `tokens` is an estimate of what the request will use, if it is then `admitted`.

        Raises:
            TooManyRequests: the queue is full.
        """
        queue, limits = self._queues.get(model_id), self._live.config.waiting
        if queue is not None and len(queue.tickets) >= limits.per_model:
            raise _full(f"{len(queue.tickets)} requests are already waiting for {model_id!r}", retry_after(model_id))
        if self._total >= limits.total:
            raise _full(f"{self._total} requests are already waiting for models", retry_after(model_id))
        if queue is None:
            turns = self._turns.setdefault(self._live.catalogue.requested(model_id).model_id, Turns[Ticket]())
            queue = self._queues[model_id] = _ModelQueue(self._clock(), turns)
        ticket = Ticket(model_id, caller, queue.turns)
        queue.tickets[ticket] = None
        queue.turns.add(ticket, caller, tokens, model_id)
        self._total += 1
        pass_on = True  # it leaves unserved, and may have been woken for a place
        try:
            yield ticket
            pass_on = ticket.notified  # it was woken again on its way to an engine, for a place of another request
        finally:
            self._remove(ticket, queue)
            if pass_on:
                self.notify_first(*ticket.names)

    def _remove(self, ticket: Ticket, queue: _ModelQueue) -> None:
        self._total -= 1
        del queue.tickets[ticket]
        queue.turns.remove(ticket, served=ticket.admitted)
        if ticket.admitted:
            self._served_at[ticket.caller.key_id] = queue.admitted_at = self._clock()
        if not queue.tickets:
            del self._queues[ticket.model_id]
            if not queue.turns and not queue.turns.owed:
                self._turns = {model_id: turns for model_id, turns in self._turns.items() if turns is not queue.turns}
        if not self._queues:
            self._served_at.clear()  # the next request arrives after all of these

    def count(self, *models: str) -> int:
        """How many requests wait for these models."""
        return sum(len(queue.tickets) for model in models if (queue := self._queues.get(model)) is not None)

    def counts(self) -> dict[str, int]:
        """How many requests wait, by the name that they give their model."""
        return {model: len(queue.tickets) for model, queue in self._queues.items()}

    def has_line(self, *models: str) -> bool:
        """Whether requests that wait for one of these models come before one that arrives now."""
        queues = map(self._queues.get, models)
        return any(ticket.in_line for queue in queues if queue is not None for ticket in queue.tickets)

    def set_in_line(self, ticket: Ticket, in_line: bool) -> None:
        """Has a waiting request join or leave the line for places. One that leaves passes on the place that it may have
        been woken for."""
        if ticket.in_line != in_line:
            ticket.in_line = in_line
            if not in_line:
                self.notify_first(*ticket.names)

    def first_request_id(self, *models: str) -> str | None:
        """The id of the request that has waited longest for one of these models; None when no request waits."""
        queues = [queue for model in models if (queue := self._queues.get(model)) is not None]
        first = min(queues, key=lambda queue: queue.since, default=None)
        return None if first is None else next(iter(first.tickets)).request_id

    @property
    def models(self) -> Iterable[str]:
        """Models that requests wait for."""
        return self._queues.keys()

    def notify(self, *models: str) -> None:
        """Something changed for these models: wakes every request that waits for one of them."""
        for model in models:
            self._notify(model, None)

    def notify_first(self, *models: str, count: int = 1) -> None:
        """There is room for some requests at an engine that serves these names of one model: wakes those in line whose
        turn it is."""
        queues = [queue for model in models if (queue := self._queues.get(model)) is not None]
        passed: list[Ticket] = []
        while queues and count > 0 and (ticket := queues[0].turns.call(*models)) is not None:
            if ticket.in_line:
                ticket.names = models
                ticket.notify()
                count -= 1
            else:
                passed.append(ticket)
        for ticket in passed:
            queues[0].turns.put_back(ticket)

    def refuse(self, model_id: str, error: ServiceError) -> None:
        """Fails every request that waits for the model with this error."""
        self._notify(model_id, error)

    def notify_all(self) -> None:
        """Wakes every waiting request."""
        for model_id in self._queues:
            self.notify(model_id)

    def waiting(self) -> Mapping[str, WaitingRequests]:
        return dict(zip(self._queues, self.waiting_for(*self._queues), strict=True))

    def waiting_for(self, *models: str) -> list[WaitingRequests]:
        """Of these models, for those that requests wait for."""
        queues = [(model, queue) for model in models if (queue := self._queues.get(model)) is not None]
        return [
            WaitingRequests(
                len(each.tickets), each.since, callers, min(map(self._last_served, callers)), each.admitted_at
            )
            for each, callers in ((each, each.turns.callers(name)) for name, each in queues)
        ]

    def _last_served(self, caller: Caller) -> float:
        return self._served_at.get(caller.key_id, -math.inf)

    def _notify(self, model_id: str, error: ServiceError | None) -> None:
        """Wakes all in the order of their turns: the first ones may take all places."""
        queue = self._queues.get(model_id)
        if queue is not None:
            for ticket in queue.tickets:
                if ticket.notified:
                    ticket.notify(error)
            while (called := queue.turns.call(model_id)) is not None:
                called.notify(error)


def _full(message: str, retry_after: float) -> TooManyRequests:
    return TooManyRequests(message, code=ErrorCode.WAITING_ROOM_FULL, retry_after=retry_after)
