"""What all requests of a worker share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from cortex.http.access_log import AccessLog
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight
from cortex.proxy.balancing.affinity import Affinity
from cortex.proxy.balancing.speeds import Speeds
from cortex.proxy.keep_alive import KeepAliveTimes
from cortex.upstream.pool import EnginePool
from cortex.upstream.replica import Failure, Replica, Route, WaitNote
from shared.tasks import TaskSet


class Control(Protocol):
    """The control of a cortex, as its workers see it: in the same process or at the other end of a channel."""

    table: dict[str, tuple[Replica, ...]]
    """Model id to the replicas that can be used without asking the control."""

    @property
    def aliases(self) -> Mapping[str, str]: ...

    @property
    def down(self) -> Collection[str]:
        """The neurons that count as down."""

    def knows(self, model_id: str) -> bool: ...

    async def resolve(self, model_id: str, failures: Sequence[Failure] = ()) -> Route:
        """Waits until the model can be served. `failures` are the replicas that this request has tried.

        Raises:
            ServiceError: the request cannot be served.
        """

    def note(self, model_id: str) -> WaitNote | None:
        """Progress of the model, for clients that wait for it; None if unknown."""


class ProxyContext:
    """One worker's connections, counts and measurements, and its access to the control."""

    def __init__(
        self,
        control: Control,
        *,
        access_log: AccessLog,
        affinity: Affinity,
        load_factor: float,
        default_model: str | None,
        keep_alive_times: KeepAliveTimes,
    ) -> None:
        """`default_model` is for requests that name none. Needs a running loop."""
        self.control = control
        self.access_log = access_log
        self.affinity = affinity
        self.load_factor = load_factor
        self.default_model = default_model
        self.keep_alive_times = keep_alive_times
        self.pool = EnginePool()
        self.hinted: set[str] = set()  # models whose operator knows why they refuse tools
        self.in_flight = InFlight()
        self.speeds = Speeds()
        self.counters = Counters()
        self.tasks = TaskSet()

    async def close(self) -> None:
        await self.tasks.close()
        self.pool.close()
        self.access_log.flush()
