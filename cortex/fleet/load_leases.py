"""Leases on loads, so that two cortexes before the same neurons do not load one model at the same moment in two places.

One neuron keeps the lease of a model: all cortexes choose the same one, by the ids of the neurons' processes. Without
an answer from it a load goes on without a lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Mapping

from cortex.fleet.membership import Refreshable
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.fleet.state import Fleet
from shared.protocol import LEASE_SECS, LeaseCommand, LeaseReply
from shared.tasks import cancel_all

log = logging.getLogger(__name__)

TIMEOUT_SECS = 1.0
"""How long a load waits for its lease: the neuron that keeps it may hang."""


class LoadedElsewhere(Exception):
    """Another cortex loads the model on `node`, or has just loaded it there."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class LoadLeases:
    """The leases of this cortex. `clients` and `pollers` are by neuron name."""

    def __init__(self, fleet: Fleet, clients: Mapping[str, NeuronClient], pollers: Mapping[str, Refreshable]) -> None:
        self._fleet = fleet
        self._clients = clients
        self._pollers = pollers
        self._holder = secrets.token_hex(8)

    @contextlib.asynccontextmanager
    async def held(self, model_id: str, name: str) -> AsyncIterator[None]:
        """Inside the body no other cortex begins to load the model.

        Raises, before the body:
            LoadedElsewhere: another cortex was faster.
        """
        fleet = self._fleet.snapshot()
        keeper, target = keeper_of(model_id, fleet), fleet.nodes.get(name)
        if keeper is None or target is None:
            yield
            return
        command = LeaseCommand(model_id=model_id, holder=self._holder, node=_identity(target))
        reply = await self._send(keeper, command)
        if reply is None:
            yield
            return
        if reply.node is not None:
            await self._check(model_id, fleet, reply)
        renewing = asyncio.create_task(self._renew(keeper, command), name=f"lease of {model_id}")
        try:
            yield
        finally:
            await cancel_all([renewing])
            await self._send(keeper, command.model_copy(update={"node": None}))

    async def _check(self, model_id: str, fleet: FleetSnapshot, reply: LeaseReply) -> None:
        """Raises LoadedElsewhere if the other cortex loads the model, or has loaded it since `fleet` was seen, on a
        neuron that we can use too."""
        other = next((node for node in fleet.nodes.values() if _identity(node) == reply.node and node.healthy), None)
        if other is None:
            return
        if reply.granted and (poller := self._pollers.get(other.name)) is not None:
            await poller.refresh()  # that load ended a moment ago: its events may still be under way
        now = self._fleet.snapshot().nodes.get(other.name, other)
        if not reply.granted or (_has(now, model_id) and not _has(other, model_id)):
            raise LoadedElsewhere(other.name)

    async def _renew(self, keeper: str, command: LeaseCommand) -> None:
        while True:
            await asyncio.sleep(LEASE_SECS / 3)
            await self._send(keeper, command)

    async def _send(self, keeper: str, command: LeaseCommand) -> LeaseReply | None:
        """None: the neuron does not answer."""
        client = self._clients.get(keeper)
        if client is None:
            return None
        try:
            return await client.lease(command, timeout_secs=TIMEOUT_SECS)
        except (NeuronRefused, NeuronUnreachable) as error:
            log.debug("no lease on loading %s: %s", command.model_id, error)
            return None


def keeper_of(model_id: str, fleet: FleetSnapshot) -> str | None:
    """The neuron that keeps the model's lease: the same for every cortex that sees these neurons healthy. None where
    there is nothing to agree on, because the fleet is a single neuron, or where none has leases (protocol v1)."""
    if len(fleet.healthy) < 2:
        return None
    ranks = {
        zlib.crc32(f"{model_id}\n{node.instance_id}".encode()): node.name
        for node in fleet.healthy
        if node.instance_id is not None and node.discovery is not None and node.discovery.leases
    }
    return ranks[min(ranks)] if ranks else None


def _identity(node: NodeSnapshot) -> str:
    """Tells other cortexes which neuron is meant: they may call it by another name."""
    return node.instance_id or node.endpoint


def _has(node: NodeSnapshot, model_id: str) -> bool:
    return node.is_loading(model_id) or node.can_serve(model_id)
