"""Requests at engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from cortex.routing.replica import ReplicaKey

CallerAt: TypeAlias = tuple[ReplicaKey, str]
"""A replica, and the id of a key whose requests it serves."""


class CallerCount(NamedTuple):
    """One key's requests at one replica: in flight, and begun since they were last taken."""

    now: int
    begun: int


class _Count:
    """Of one replica. One object instead of two dictionaries: a request looks its key up once at each end."""

    __slots__ = ("begun", "now")

    def __init__(self) -> None:
        self.now = 0
        self.begun = 0


class InFlight:
    """One worker's exact counts: a request counts from the choice of its engine to the last byte of its answer.
    `elsewhere` are the counts that the other workers last reported."""

    def __init__(self) -> None:
        self._counts: dict[ReplicaKey, _Count] = {}
        self._callers: dict[CallerAt, _Count] = {}
        self._here: dict[ReplicaKey, int] | None = None  # as last read, until a count changes
        self.elsewhere: Mapping[ReplicaKey, int] = {}
        self.on_change: Callable[[], None] | None = None

    @property
    def here(self) -> Mapping[ReplicaKey, int]:
        """Requests in flight, without replicas that have none. Not updated later."""
        if self._here is None:
            self._here = {key: count.now for key, count in self._counts.items() if count.now}
        return self._here

    @property
    def begun(self) -> dict[ReplicaKey, int]:
        """Requests since the process began."""
        return {key: count.begun for key, count in self._counts.items()}

    def take_callers(self) -> dict[CallerAt, CallerCount]:
        """The requests of each API key: in flight now, and begun since the last call."""
        taken = {at: CallerCount(count.now, count.begun) for at, count in self._callers.items()}
        self._callers = {at: count for at, count in self._callers.items() if count.now}
        for count in self._callers.values():
            count.begun = 0
        return taken

    def add_caller(self, key: ReplicaKey, key_id: str) -> None:
        """Of the requests that have been added, one is this key's."""
        count = self._callers.get((key, key_id))
        if count is None:
            count = self._callers[key, key_id] = _Count()
        count.now += 1
        count.begun += 1

    def remove_caller(self, key: ReplicaKey, key_id: str) -> None:
        self._callers[key, key_id].now -= 1

    def add(self, key: ReplicaKey) -> None:
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = _Count()
        count.now += 1
        count.begun += 1
        self._here = None
        if self.on_change is not None:
            self.on_change()

    def remove(self, key: ReplicaKey) -> None:
        self._counts[key].now -= 1
        self._here = None
        if self.on_change is not None:
            self.on_change()

    def count(self, key: ReplicaKey) -> int:
        count = self._counts.get(key)
        return (0 if count is None else count.now) + self.elsewhere.get(key, 0)
