"""Leases on loads, so that two cortexes before the same neurons do not load one model at the same moment in two places.

One neuron keeps the lease of a model: all cortexes choose the same one, by the ids of the neurons' processes. Without
an answer from it a load goes on without a lease. Loads of several instances of a model share one lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from cortex.fleet.members.membership import Refreshable
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


@dataclass
class _SharedLease:
    """The lease of the loads of one model. `waiting` and `loading` count them; `elsewhere` is the neuron on which
    another cortex loads the model."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    loading: int = 0
    elsewhere: str | None = None


class LoadLeases:
    """The leases of this cortex. `clients` and `pollers` are by neuron name."""

    def __init__(self, fleet: Fleet, clients: Mapping[str, NeuronClient], pollers: Mapping[str, Refreshable]) -> None:
        self._fleet = fleet
        self._clients = clients
        self._pollers = pollers
        self._holder = secrets.token_hex(8)
        self._leases: dict[str, _SharedLease] = {}  # by model id

    @contextlib.asynccontextmanager
    async def held(self, model_id: str, name: str, planned_on: FleetSnapshot) -> AsyncIterator[None]:
        """Inside the body no other cortex begins to load the model. `planned_on` is the fleet that led to this load.

        Raises, before the body:
            LoadedElsewhere: another cortex was faster.
        """
        keeper, target = keeper_of(model_id, planned_on), planned_on.nodes.get(name)
        if keeper is None or target is None:
            yield
            return
        command = LeaseCommand(model_id=model_id, holder=self._holder, node=_identity(target))
        shared = self._leases.setdefault(model_id, _SharedLease())
        shared.waiting += 1
        try:
            async with shared.lock:
                await self._acquire(keeper, command, shared, planned_on)
                shared.loading += 1
        finally:
            shared.waiting -= 1
            if not shared.waiting:
                shared.elsewhere = None
            self._forget(model_id, shared)
        renewing = asyncio.create_task(self._renew(keeper, command), name=f"lease of {model_id}")
        try:
            yield
        finally:
            await cancel_all([renewing])
            async with shared.lock:
                shared.loading -= 1
                if not shared.loading:
                    await self._send(keeper, command.model_copy(update={"node": None}))
            self._forget(model_id, shared)

    async def _acquire(
        self, keeper: str, command: LeaseCommand, shared: _SharedLease, planned_on: FleetSnapshot
    ) -> None:
        """Raises LoadedElsewhere for all loads that wait with the one that finds out: their plans are from the same
        time, and the neuron tells only the first of them."""
        if shared.elsewhere is not None:
            raise LoadedElsewhere(shared.elsewhere)
        reply = await self._send(keeper, command)
        if reply is None or (reply.granted and shared.loading):
            return
        shared.elsewhere = await self._loaded_elsewhere(command.model_id, planned_on, reply)
        if shared.elsewhere is not None:
            if reply.granted:
                await self._send(keeper, command.model_copy(update={"node": None}))
            raise LoadedElsewhere(shared.elsewhere)

    def _forget(self, model_id: str, shared: _SharedLease) -> None:
        if not shared.waiting and not shared.loading and self._leases.get(model_id) is shared:
            del self._leases[model_id]

    async def _loaded_elsewhere(self, model_id: str, planned_on: FleetSnapshot, reply: LeaseReply) -> str | None:
        """A neuron that we can use too, on which the other cortex loads the model, or has loaded it since the plan."""
        told = {reply.node, *reply.nodes}
        others = [node for node in planned_on.nodes.values() if _identity(node) in told and node.healthy]
        if reply.granted:  # those loads ended a moment ago: their events may still be under way
            pollers = [poller for node in others if (poller := self._pollers.get(node.name)) is not None]
            await asyncio.gather(*(poller.refresh() for poller in pollers))
        fleet = self._fleet.snapshot()
        for other in others:
            now = fleet.nodes.get(other.name, other)
            if not reply.granted or _engines(now, model_id) > _engines(other, model_id):
                return other.name
        return None

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


def _engines(node: NodeSnapshot, model_id: str) -> int:
    """How many engines of the model are loaded there or starting."""
    return sum(view.coming or view.servable_now for view in node.instances(model_id).values())
