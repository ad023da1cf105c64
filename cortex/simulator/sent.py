"""What a simulated cortex has sent to engines, as a worker would count it."""

from __future__ import annotations

from collections.abc import Mapping

from cortex.metrics.counters import Tally
from cortex.metrics.in_flight import InFlight, Key
from cortex.metrics.worker_counts import Counts


class Sent:
    """The only worker: every request that was begun, and those that have not ended."""

    def __init__(self) -> None:
        self.requests = InFlight()

    def counts(self) -> Counts:
        counts = Counts()
        counts.attach(self)
        return counts

    def collect(self) -> Tally:
        return Tally()

    def in_flight_here(self) -> Mapping[Key, int]:
        return self.requests.here

    def begun_here(self) -> Mapping[Key, int]:
        return self.requests.begun

    async def refresh(self) -> None:
        """It is live."""
