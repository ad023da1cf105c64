"""One engine of a model, in virtual time. No I/O."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from shared.protocol import FIRST_INSTANCE, GroupPart, ModelActivity, ModelStatus


@dataclass
class SimulatedRequest:
    """One request of the trace. `begun` and `ended` are None until then; an unserved request never begins. `cold`: it
    had to wait for its model. `key` is the name of its API key, "" without one."""

    number: int
    model: str
    at: float
    secs: float
    begun: float | None = None
    ended: float | None = None
    cold: bool = False
    key: str = ""

    @property
    def waited(self) -> float:
        """Seconds until it began, or ended unserved. Call it after the request has ended."""
        until = self.ended if self.begun is None else self.begun
        assert until is not None
        return until - self.at


class SimulatedEngine:
    """Serves up to `parallel` requests at full speed; more share that total speed equally.

    Work is counted in seconds at full speed: `_done` is what each request would have received since the start, so a
    request ends when `_done` has grown by its `secs`. `group`: it is one part of an engine that spans several neurons.
    """

    def __init__(
        self,
        model_id: str,
        devices: tuple[int, ...],
        device_share_mb: int,
        parallel: int,
        *,
        instance: str = FIRST_INSTANCE,
        variant: str | None = None,
        group: GroupPart | None = None,
        max_loras: int | None = None,
    ) -> None:
        self.model_id = model_id
        self.instance = instance
        self.variant = variant
        self.group = group
        self.max_loras = max_loras
        self.adapters: list[str] = []
        self.devices = devices
        self.device_share_mb = device_share_mb
        self.status = ModelStatus.LOADING
        self._parallel = parallel
        self._done = 0.0
        self._as_of = 0.0
        self._ends: list[tuple[float, int, SimulatedRequest]] = []

    @property
    def booked_mb(self) -> int:
        """MiB on all its devices together."""
        return self.device_share_mb * len(self.devices)

    @property
    def working_mb(self) -> int:
        """MiB that work on a request: with a group those of all parts, which are alike."""
        return self.booked_mb * (1 if self.group is None else self.group.size)

    @property
    def serves(self) -> bool:
        """Whether it takes requests: of a group only one part does."""
        return self.group is None or self.group.serves

    @property
    def in_flight(self) -> int:
        return len(self._ends)

    def begin(self, request: SimulatedRequest, now: float) -> None:
        self._work(now)
        heapq.heappush(self._ends, (self._done + request.secs, request.number, request))

    def next_end(self) -> float | None:
        """When the next request ends unless another begins first; None when there is none."""
        if not self._ends:
            return None
        return self._as_of + max(0.0, self._ends[0][0] - self._done) / self._speed

    def end_next(self, now: float) -> SimulatedRequest:
        """Removes and returns the request that ends now."""
        self._work(now)
        end, _, request = heapq.heappop(self._ends)
        self._done = max(self._done, end)  # rounding
        return request

    @property
    def activity(self) -> ModelActivity:
        """What its neuron reports: those beyond `parallel` count as queued."""
        running = min(len(self._ends), self._parallel)
        return ModelActivity(
            id=self.model_id, instance=self.instance, in_flight=running, queue_depth=len(self._ends) - running
        )

    @property
    def _speed(self) -> float:
        return min(1.0, self._parallel / len(self._ends)) if self._ends else 1.0

    def _work(self, now: float) -> None:
        self._done += (now - self._as_of) * self._speed
        self._as_of = now
