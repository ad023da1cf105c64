"""The relative speeds of a model's replicas, learned from their answers. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from cortex.routing.replica import ReplicaKey

_WEIGHT: Final = 0.05  # of an answer in its replica's average: about the last 20 count
_USUAL_WEIGHT: Final = 0.02
_ASSUMED: Final = 10
"""Answers of usual speed that every replica starts with: the first ones of a new engine are often slow, and an engine
that seems slow gets few requests by which to show that it is not."""
_MOST: Final = math.log(4)

Kind = tuple[str, bytes, bool]
"""(model id, path, whether it is an event stream). Answers of one kind are comparable by bytes; a token takes fifty
times as many bytes in an event as in a plain answer."""


class Speeds:
    """One worker's measurements, of each engine: those of one host may run on different cards. They make configuring
    the speeds of mismatched GPUs unnecessary.

    Each answer's seconds per byte are compared with the average of its kind; the mean ratio, within a factor of 4, is
    the replica's speed. Means are of logarithms and clipped, so an answer that took a hundred times as long counts as
    four. The current load is part of the measurement: a busy engine looks slower and gets less. That errs towards an
    even split and is stable; throughput would not be, because it grows with the number of requests.
    """

    __slots__ = ("_slowness", "_usual")

    def __init__(self) -> None:
        self._usual: dict[Kind, tuple[float, int]] = {}  # log of seconds per byte, answers seen
        self._slowness: dict[ReplicaKey, tuple[float, int]] = {}  # log of a factor, answers

    def learn(self, kind: Kind, key: ReplicaKey, secs: float, sent_bytes: int) -> None:
        """Records that a complete answer of `sent_bytes` from this replica took `secs`."""
        if secs <= 0 or sent_bytes <= 0:
            return
        took = math.log(secs / sent_bytes)
        usual, seen = self._usual.get(kind, (took, 0))
        usual += (took - usual) * max(_USUAL_WEIGHT, 1 / (seen + 1))
        self._usual[kind] = usual, seen + 1
        slowness, answers = self._slowness.get(key, (0.0, 0))
        beside = max(-_MOST, min(_MOST, took - usual))
        self._slowness[key] = slowness + (beside - slowness) * max(_WEIGHT, 1 / (answers + 1 + _ASSUMED)), answers + 1

    def of(self, keys: Sequence[ReplicaKey]) -> list[float]:
        """The speed of each replica: 1/4 to 4; 1 is average, and also means no measurements."""
        slowness = self._slowness
        if not slowness:
            return [1.0] * len(keys)
        speeds: list[float] = []
        for key in keys:
            known = slowness.get(key)
            speeds.append(1.0 if known is None else math.exp(-known[0]))
        return speeds
