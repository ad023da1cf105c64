"""Requests at engines, by model and neuron."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cortex.routing.replica import ReplicaKey


class InFlight:
    """One worker's exact counts: a request counts from the choice of its neuron to the last byte of its answer.
    `elsewhere` are the counts that the other workers last reported."""

    def __init__(self) -> None:
        self.here: dict[ReplicaKey, int] = {}
        self.begun: dict[ReplicaKey, int] = {}  # since the process began; only grows
        self.elsewhere: Mapping[ReplicaKey, int] = {}
        self.on_change: Callable[[], None] | None = None

    def add(self, key: ReplicaKey) -> None:
        self.here[key] = self.here.get(key, 0) + 1
        self.begun[key] = self.begun.get(key, 0) + 1
        if self.on_change is not None:
            self.on_change()

    def remove(self, key: ReplicaKey) -> None:
        left = self.here[key] - 1
        if left:
            self.here[key] = left
        else:
            del self.here[key]
        if self.on_change is not None:
            self.on_change()

    def count(self, key: ReplicaKey) -> int:
        return self.here.get(key, 0) + self.elsewhere.get(key, 0)
