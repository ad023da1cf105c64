"""What a simulated cortex has sent to engines, as a worker would count it."""

from __future__ import annotations

from collections.abc import Mapping

from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight, Key
from cortex.metrics.worker_counts import CountTotals


class Sent:
    """The only worker: every request that was begun, and those that have not ended."""

    def __init__(self) -> None:
        self.requests = InFlight()

    def counts(self) -> CountTotals:
        counts = CountTotals()
        counts.attach(self)
        return counts

    def collect(self) -> Counters:
        return Counters()

    def in_flight_here(self) -> Mapping[Key, int]:
        return self.requests.here

    def begun_here(self) -> Mapping[Key, int]:
        return self.requests.begun

    async def refresh(self) -> None:
        """It is live."""
