"""No gateway: the engine and the load generator alone."""

from __future__ import annotations

import sys

from benchmarks.contenders.contender import Contender, Launch, Place


def _prepare(place: Place) -> Launch:
    return Launch([sys.executable, "-m", "benchmarks.engine", str(place.port)])


DIRECT = Contender("direct", "the fake engine alone", "nothing between", _prepare)
