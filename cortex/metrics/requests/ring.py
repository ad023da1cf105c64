"""The live and recent requests of one worker. It only takes notes; what they look like is worked out for those that
ask."""

from __future__ import annotations

from typing import Final, Protocol, TypeAlias

from cortex.accounts.usage.record import UsageRecord
from cortex.metrics.requests.entries import EndedRequest, FailedAttempt, LiveRequest, SeenRequests, Wait
from cortex.metrics.requests.filter import RequestFilter

KEPT_REQUESTS: Final = 1000

Note: TypeAlias = tuple[UsageRecord, str, str, str, bool, str, list[FailedAttempt] | None, list[Wait] | None]
"""The fields of an EndedRequest: a tuple is made in a fraction of the time of a struct."""


class OngoingRequest(Protocol):
    """A request until its end."""

    def shown(self) -> LiveRequest: ...

    def fits(self, asked: RequestFilter) -> bool: ...


class RequestRing:
    """Owns the notes. The oldest make room for the newest."""

    def __init__(self) -> None:
        self._live: dict[OngoingRequest, None] = {}  # in the order in which they began
        self._notes: list[Note | None] = [None] * KEPT_REQUESTS
        self._count = 0

    def began(self, request: OngoingRequest) -> None:
        self._live[request] = None

    def ended(self, request: OngoingRequest, note: Note) -> None:
        """Must be called once for each request that began."""
        self._live.pop(request, None)
        self._notes[self._count % KEPT_REQUESTS] = note
        self._count += 1

    def since(self, place: int, asked: RequestFilter, limit: int) -> SeenRequests:
        """What ended after this place, as far as it is still known, and of what goes on and fits the oldest `limit`:
        there may be thousands."""
        first = max(place, self._count - KEPT_REQUESTS)
        notes = [self._notes[number % KEPT_REQUESTS] for number in range(first, self._count)]
        ended = [EndedRequest(*note) for note in notes if note is not None]
        live = [request for request in self._live if request.fits(asked)]
        return SeenRequests(self._count, ended, [request.shown() for request in live[:limit]], len(live))
