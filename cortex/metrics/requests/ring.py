"""The live and recent requests of one worker. It only takes notes; what they look like is worked out for those that
ask."""

from __future__ import annotations

from typing import Final, Protocol, TypeAlias

from cortex.accounts.usage.record import UsageRecord
from cortex.metrics.requests.entries import EndedRequest, FailedAttempt, LiveRequest, SeenRequests, Wait

KEPT_REQUESTS: Final = 1000

Note: TypeAlias = tuple[UsageRecord, str, str, str, bool, str, list[FailedAttempt] | None, list[Wait] | None]
"""The fields of an EndedRequest: a tuple is made in a fraction of the time of a struct."""


class OngoingRequest(Protocol):
    """A request until its end."""

    def shown(self) -> LiveRequest: ...


class RequestRing:
    """Owns the notes. The oldest make room for the newest."""

    def __init__(self) -> None:
        self._live: set[OngoingRequest] = set()
        self._notes: list[Note | None] = [None] * KEPT_REQUESTS
        self._count = 0

    def began(self, request: OngoingRequest) -> None:
        self._live.add(request)

    def ended(self, request: OngoingRequest, note: Note) -> None:
        """Must be called once for each request that began."""
        self._live.discard(request)
        self._notes[self._count % KEPT_REQUESTS] = note
        self._count += 1

    def since(self, place: int) -> SeenRequests:
        """What ended after this place, as far as it is still known, and what goes on."""
        first = max(place, self._count - KEPT_REQUESTS)
        notes = [self._notes[number % KEPT_REQUESTS] for number in range(first, self._count)]
        ended = [EndedRequest(*note) for note in notes if note is not None]
        return SeenRequests(self._count, ended, [request.shown() for request in self._live])
