"""The waiting rooms: requests that wait for a model that cannot serve yet. Bounded for each model and in all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cortex.config.live import LiveConfig
from cortex.placement.inputs import Waiting
from shared.errors import ServiceError, TooManyRequests
from shared.tasks import timeout

CODE = "waiting_room_full"


class Ticket:
    """One request's place. It hears of what may end its waiting; what it was told while it did not listen is kept."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self._event = asyncio.Event()
        self._error: ServiceError | None = None

    async def news(self, *, within_secs: float) -> None:
        """Returns when something has changed for the model.

        Raises:
            ServiceError: it cannot be served. asyncio.TimeoutError: nothing came within that time.
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
class _Room:
    since: float
    seats: dict[Ticket, None] = field(default_factory=dict)  # in order of arrival


class AdmissionQueue:
    """Owner of all seats. Times are `clock`'s."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live = live
        self._clock = clock
        self._rooms: dict[str, _Room] = {}
        self._taken = 0

    @contextlib.contextmanager
    def seat(self, model_id: str, retry_after: Callable[[str], float]) -> Iterator[Ticket]:
        """A seat inside the body. `retry_after` tells in how many seconds the model should be there, for who finds
        none.

        Raises:
            TooManyRequests: there is none left.
        """
        room, limits = self._rooms.get(model_id), self._live.config.waiting
        if room is not None and len(room.seats) >= limits.per_model:
            raise _full(f"{len(room.seats)} requests are waiting for {model_id!r} already", retry_after(model_id))
        if self._taken >= limits.total:
            raise _full(f"{self._taken} requests are waiting for models already", retry_after(model_id))
        if room is None:
            room = self._rooms[model_id] = _Room(self._clock())
        seat = Ticket(model_id)
        room.seats[seat] = None
        self._taken += 1
        try:
            yield seat
        finally:
            self._taken -= 1
            del room.seats[seat]
            if not room.seats:
                del self._rooms[model_id]

    def count(self, model_id: str) -> int:
        room = self._rooms.get(model_id)
        return 0 if room is None else len(room.seats)

    @property
    def models(self) -> Iterable[str]:
        """Models that somebody waits for."""
        return self._rooms.keys()

    def news(self, model_id: str) -> None:
        """Something has changed for the model: all who wait for it look again."""
        self._tell(model_id, None)

    def refuse(self, model_id: str, error: ServiceError) -> None:
        """All who wait for the model are told that it cannot be served."""
        self._tell(model_id, error)

    def news_for_all(self) -> None:
        """Something has changed for everybody."""
        for model_id in self._rooms:
            self.news(model_id)

    def waiting(self) -> Mapping[str, Waiting]:
        return {model_id: Waiting(len(room.seats), room.since) for model_id, room in self._rooms.items()}

    def _tell(self, model_id: str, error: ServiceError | None) -> None:
        room = self._rooms.get(model_id)
        for seat in () if room is None else room.seats:
            seat.tell(error)


def _full(what: str, retry_after: float) -> TooManyRequests:
    return TooManyRequests(what, code=CODE, retry_after=retry_after)
