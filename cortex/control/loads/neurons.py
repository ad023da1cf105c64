"""The neurons that loads and evictions talk to."""

from __future__ import annotations

from collections.abc import Mapping

from cortex.fleet.members.membership import NeuronCommands, Refreshable
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet, NodeRemoved


class NeuronAccess:
    """What is known of a neuron now, and how to command it. `clients` and `pollers` are by name."""

    def __init__(self, fleet: Fleet, clients: Mapping[str, NeuronCommands], pollers: Mapping[str, Refreshable]) -> None:
        self.fleet = fleet
        self._clients = clients
        self._pollers = pollers

    def node(self, name: str) -> NodeSnapshot:
        """Raises NodeRemoved if it left the configuration."""
        if (node := self.fleet.snapshot().nodes.get(name)) is None:
            raise NodeRemoved(name)
        return node

    def client(self, name: str) -> NeuronCommands:
        """Raises NodeRemoved if it left the configuration."""
        if (client := self._clients.get(name)) is None:
            raise NodeRemoved(name)
        return client

    def has_extensions(self, name: str) -> bool:
        """False for a protocol v1 neuron: it has no instance id and supports only the six basic requests. Raises as
        `node`."""
        return self.node(name).instance_id is not None

    async def refresh(self, name: str) -> None:
        """Polls it now, unless it left the configuration."""
        if (poller := self._pollers.get(name)) is not None:
            await poller.refresh()
