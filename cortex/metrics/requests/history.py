"""The requests of all workers, in the control process."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import islice
from typing import NamedTuple, Protocol

from cortex.metrics.requests.entries import EndedRequest, LiveRequest, SeenRequests
from cortex.metrics.requests.filter import RequestFilter
from cortex.metrics.requests.ring import KEPT_REQUESTS

_LONGEST_COUNT = 19
"""In digits; Python reads no number of more than some thousands."""


class RequestSource(Protocol):
    """A worker."""

    async def requests_since(self, place: int, asked: RequestFilter, limit: int) -> SeenRequests:
        """Of this worker, what ended after the place that it told last, 0 at first, and as of `RequestRing.since` what
        goes on. Without an answer in time nothing, and the same place."""


class RequestsNow(NamedTuple):
    """`place`: for the next look, which then has only what ended after it. `whole`: it has all that is known.
    `ended`: newest first, whether they fit or not; `live`: the oldest of those that fit, oldest first, of
    `live_count`."""

    place: str
    whole: bool
    ended: list[EndedRequest]
    live: list[LiveRequest]
    live_count: int


class RequestHistory:
    """Asks the workers when it is asked, and not otherwise: requests cost nothing here between two looks. What a
    worker had that ended unasked is lost with it."""

    def __init__(self) -> None:
        self._places: dict[RequestSource, int] = {}
        self._ended: deque[EndedRequest] = deque(maxlen=KEPT_REQUESTS)
        self._count = 0
        self._origin = f"{time.time_ns():x}"  # places of a former cortex mean nothing here
        self._looking = asyncio.Lock()

    def attach(self, worker: RequestSource) -> None:
        self._places[worker] = 0

    def detach(self, worker: RequestSource) -> None:
        del self._places[worker]

    async def since(self, place: str | None, asked: RequestFilter, limit: int) -> RequestsNow:
        """The requests that ended after this place; all that are known without one, or if it is not known any more. At
        most `limit` live ones."""
        async with self._looking:  # or two would take the same requests from a worker
            answers = await self._ask(asked, limit)
        behind = self._behind(place)
        ended = list(islice(reversed(self._ended), behind))
        live = sorted((each for seen in answers for each in seen.live), key=lambda each: each.since)[:limit]
        count = sum(seen.live_count for seen in answers)
        return RequestsNow(f"{self._origin}-{self._count}", behind is None, ended, live, count)

    async def _ask(self, asked: RequestFilter, limit: int) -> list[SeenRequests]:
        workers = list(self._places.items())
        answers = await asyncio.gather(*(worker.requests_since(place, asked, limit) for worker, place in workers))
        for (worker, _), seen in zip(workers, answers, strict=True):
            if worker in self._places:
                self._places[worker] = seen.place
        new = sorted((each for seen in answers for each in seen.ended), key=lambda each: each.record.ended_at)
        self._ended.extend(new)
        self._count += len(new)
        return answers

    def _behind(self, place: str | None) -> int | None:
        """How many have ended since; None if not all of them are known."""
        origin, _, count = (place or "").partition("-")
        if origin != self._origin or not (count.isascii() and count.isdigit() and len(count) <= _LONGEST_COUNT):
            return None
        behind = self._count - int(count)
        return behind if 0 <= behind <= len(self._ended) else None
