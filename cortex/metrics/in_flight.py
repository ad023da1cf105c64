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
    __slots__ = ("begun", "now")

    def __init__(self) -> None:
        self.now = 0
        self.begun = 0


class _ReplicaCount(_Count):
    """Of one replica, with those of each API key. One object instead of several dictionaries: a request looks its
    replica up once at each end."""

    __slots__ = ("callers",)

    def __init__(self) -> None:
        super().__init__()
        self.callers: dict[str, _Count] = {}


class InFlight:
    """One worker's exact counts: a request counts from the choice of its engine to the last byte of its answer.
    `elsewhere` are the counts that the other workers last reported."""

    def __init__(self) -> None:
        self._counts: dict[ReplicaKey, _ReplicaCount] = {}
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
        taken: dict[CallerAt, CallerCount] = {}
        for key, replica in self._counts.items():
            for key_id, count in replica.callers.items():
                taken[key, key_id] = CallerCount(count.now, count.begun)
                count.begun = 0
            replica.callers = {key_id: count for key_id, count in replica.callers.items() if count.now}
        return taken

    def add(self, key: ReplicaKey, key_id: str = "") -> None:
        """A request begins there. `key_id`: of its client's API key, if it has one."""
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = _ReplicaCount()
        count.now += 1
        count.begun += 1
        if key_id:
            caller = count.callers.get(key_id)
            if caller is None:
                caller = count.callers[key_id] = _Count()
            caller.now += 1
            caller.begun += 1
        self._changed()

    def remove(self, key: ReplicaKey, key_id: str = "") -> None:
        """A request has ended, which `add` has been told of with the same arguments."""
        count = self._counts[key]
        count.now -= 1
        if key_id:
            count.callers[key_id].now -= 1
        self._changed()

    def _changed(self) -> None:
        self._here = None
        if self.on_change is not None:
            self.on_change()

    def count(self, key: ReplicaKey) -> int:
        count = self._counts.get(key)
        return (0 if count is None else count.now) + self.elsewhere.get(key, 0)
