"""The admission queue: requests that wait for a model that cannot serve yet. Bounded per model and in total."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cortex.config.live import LiveConfig
from cortex.placement.inputs import WaitingRequests
from shared.errors import ServiceError, TooManyRequests
from shared.protocol import ErrorCode
from shared.request_ids import current_request_id
from shared.tasks import timeout


class Ticket:
    """One waiting request. A notification that arrives while it does not wait is kept."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.request_id = current_request_id()
        self._event = asyncio.Event()
        self._error: ServiceError | None = None

    async def news(self, *, within_secs: float) -> None:
        """Returns when something has changed for the model.

        Raises:
            ServiceError: it cannot be served. asyncio.TimeoutError: no news within that time.
        """
        async with timeout(within_secs):
            await self._event.wait()
        self._event.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def tell(self, error: ServiceError | None = None) -> None:
        self._error = error
        self._event.set()


@dataclass
class _Line:
    since: float
    tickets: dict[Ticket, None] = field(default_factory=dict)  # in order of arrival


class AdmissionQueue:
    """Owner of all tickets. Times are `clock`'s."""

    def __init__(self, *, live: LiveConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = live
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._taken = 0

    @contextlib.contextmanager
    def ticket(self, model_id: str, retry_after: Callable[[str], float]) -> Iterator[Ticket]:
        """A ticket inside the body. `retry_after` estimates the seconds until the model is loaded, for the error.

        Raises:
            TooManyRequests: the queue is full.
        """
        line, limits = self._lines.get(model_id), self._live.config.waiting
        if line is not None and len(line.tickets) >= limits.per_model:
            raise _full(f"{len(line.tickets)} requests are already waiting for {model_id!r}", retry_after(model_id))
        if self._taken >= limits.total:
            raise _full(f"{self._taken} requests are already waiting for models", retry_after(model_id))
        if line is None:
            line = self._lines[model_id] = _Line(self._clock())
        ticket = Ticket(model_id)
        line.tickets[ticket] = None
        self._taken += 1
        try:
            yield ticket
        finally:
            self._taken -= 1
            del line.tickets[ticket]
            if not line.tickets:
                del self._lines[model_id]

    def count(self, model_id: str) -> int:
        line = self._lines.get(model_id)
        return 0 if line is None else len(line.tickets)

    def first_request_id(self, model_id: str) -> str | None:
        """The id of the request that has waited longest for the model; None when no request waits."""
        line = self._lines.get(model_id)
        return None if line is None else next(iter(line.tickets)).request_id

    @property
    def models(self) -> Iterable[str]:
        """Models that requests wait for."""
        return self._lines.keys()

    def news(self, model_id: str) -> None:
        """Something changed for the model: every request that waits for it looks again."""
        self._tell(model_id, None)

    def refuse(self, model_id: str, error: ServiceError) -> None:
        """Ends the wait of every request for the model with this error."""
        self._tell(model_id, error)

    def news_for_all(self) -> None:
        """Something changed for every model."""
        for model_id in self._lines:
            self.news(model_id)

    def waiting(self) -> Mapping[str, WaitingRequests]:
        return {model_id: WaitingRequests(len(line.tickets), line.since) for model_id, line in self._lines.items()}

    def _tell(self, model_id: str, error: ServiceError | None) -> None:
        line = self._lines.get(model_id)
        for ticket in () if line is None else line.tickets:
            ticket.tell(error)


def _full(message: str, retry_after: float) -> TooManyRequests:
    return TooManyRequests(message, code=ErrorCode.WAITING_ROOM_FULL, retry_after=retry_after)
