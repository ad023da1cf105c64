"""How fast the replicas of a model are beside each other, learned from their answers: no clock, no configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

_WEIGHT: Final = 0.05  # of an answer in the average of its replica: about the last 20 count
_USUAL_WEIGHT: Final = 0.02
_MOST: Final = math.log(4)

Kind = tuple[str, bytes, bool]
"""(model id, path, whether it was a stream of events). Answers of one kind are comparable byte by byte; an event takes
fifty times the bytes that its token takes in a plain answer."""


class Speeds:
    """One worker's measurements. Mismatched cards differ by factors, and nobody has to configure by which.

    An answer is compared with the usual one of its kind, in seconds per byte; a replica's speed is the average of that,
    within a factor of 4. Averages are of logarithms, so that one answer that took a hundred times as long counts as
    four. What an engine is loaded with is in it: a crowded one looks slower and is sent less, which errs towards an
    even split and cannot run away, as throughput would (whoever is sent more, has more).
    """

    __slots__ = ("_slowness", "_usual")

    def __init__(self) -> None:
        self._usual: dict[Kind, tuple[float, int]] = {}  # log of seconds per byte, answers seen
        self._slowness: dict[tuple[str, str], tuple[float, int]] = {}  # (model id, node): log of a factor, answers

    def learn(self, kind: Kind, node: str, secs: float, sent_bytes: int) -> None:
        """A whole answer of `sent_bytes` came `secs` after its request."""
        if secs <= 0 or sent_bytes <= 0:
            return
        took = math.log(secs / sent_bytes)
        usual, seen = self._usual.get(kind, (took, 0))
        usual += (took - usual) * max(_USUAL_WEIGHT, 1 / (seen + 1))
        self._usual[kind] = usual, seen + 1
        key = kind[0], node
        slowness, answers = self._slowness.get(key, (0.0, 0))
        beside = max(-_MOST, min(_MOST, took - usual))
        self._slowness[key] = slowness + (beside - slowness) * max(_WEIGHT, 1 / (answers + 1)), answers + 1

    def of(self, model_id: str, nodes: Sequence[str]) -> list[float]:
        """The speed of the model on each node: 1/4 to 4, where 1 is the usual one. A replica that nobody has measured
        counts as that."""
        slowness = self._slowness
        if not slowness:
            return [1.0] * len(nodes)
        speeds: list[float] = []
        for node in nodes:
            known = slowness.get((model_id, node))
            speeds.append(1.0 if known is None else math.exp(-known[0]))
        return speeds
