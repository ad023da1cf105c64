"""What all requests of a worker share."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from cortex.config.catalogue import AUTO_TOOL_CHOICE, TOOLS_HINT
from cortex.config.settings import CortexConfig
from cortex.http.access_log import AccessLog
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight
from cortex.proxy.answers.keep_alive import KeepAlivePolicy
from cortex.proxy.balancing.affinity import Affinity
from cortex.proxy.balancing.speeds import Speeds
from cortex.upstream.pool import EnginePool
from cortex.upstream.replica import Failure, Replica, Route, WaitNote
from cortex.upstream.response_owners import ResponseOwners
from shared.tasks import TaskSet

log = logging.getLogger(__name__)


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

    def tell_owner(self, response_id: str, replica: Replica) -> None:
        """Tells the other workers which engine made a stored response."""

    def note(self, model_id: str) -> WaitNote | None:
        """Progress of the model, for clients that wait for it; None if unknown."""


class ProxyContext:
    """One worker's connections, counts and measurements, and its access to the control."""

    def __init__(
        self,
        control: Control,
        config: CortexConfig,
        *,
        access_log: AccessLog,
    ) -> None:
        """Needs a running loop."""
        self.control = control
        self.access_log = access_log
        self.configure(config)
        self.pool = EnginePool()
        self._hinted: set[str] = set()  # models whose operator knows why they refuse tools
        self.in_flight = InFlight()
        self.response_owners = ResponseOwners()
        self.speeds = Speeds()
        self.counters = Counters()
        self.tasks = TaskSet()

    def configure(self, config: CortexConfig) -> None:
        """Applies this configuration to requests that arrive from now on."""
        routing, waiting, gateway = config.routing, config.waiting, config.gateway
        self.affinity = Affinity(routing.session_header, routing.prefix_chars)
        self.load_factor = routing.load_factor
        self.keep_alive = KeepAlivePolicy(
            waiting.first_comment_secs,
            waiting.comment_interval_secs,
            gateway.keepalive_secs,
            whitespace=waiting.plain_keepalive == "whitespace",
        )
        self.default_model = gateway.default_model  # for requests that name none

    def hint_at_tools(self, model_id: str, node: str, refusal: bytes) -> None:
        """Tells the operator, once a model, why clients cannot offer it tools. `refusal` is the engine's error."""
        if model_id not in self._hinted and AUTO_TOOL_CHOICE in refusal:
            self._hinted.add(model_id)
            log.warning("%s on %s refused a request with tools: %s", model_id, node, TOOLS_HINT)

    async def close(self) -> None:
        await self.tasks.close()
        self.pool.close()
        self.access_log.flush()
