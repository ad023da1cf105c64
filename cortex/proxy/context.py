"""What all requests of a worker share."""

from __future__ import annotations

import logging

from cortex.config.catalogue import AUTO_TOOL_CHOICE, TOOLS_HINT
from cortex.config.settings import CortexConfig
from cortex.http.access_log import AccessLog
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import InFlight
from cortex.proxy.answers.keep_alive import KeepAlivePolicy
from cortex.routing.affinity import Affinity
from cortex.routing.control import Control
from cortex.routing.missing_paths import MissingPaths
from cortex.routing.response_owners import ResponseOwners
from cortex.routing.speeds import Speeds
from cortex.upstream.pool import EnginePool
from shared.tasks import TaskSet

log = logging.getLogger(__name__)


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
        self.missing_paths = MissingPaths()
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
