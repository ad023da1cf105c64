"""Loads an engine that spans several neurons: all of its parts, or none."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

from cortex.config.live import LiveConfig
from cortex.config.profile import ModelProfile
from cortex.control.load_backoff import BackoffCause
from cortex.control.load_failure import LoadFailure, failure_of
from cortex.control.loads.neurons import NeuronAccess
from cortex.fleet.load_leases import LoadedElsewhere
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.state import NodeRemoved
from cortex.fleet.unless_down import unless_down
from cortex.placement.load_plan import LoadPlan, part_command
from cortex.routing.replica import ReplicaKey
from shared.protocol import ErrorCode, GroupPart, GroupPeer, ListenReply, ReachCommand
from shared.tasks import cancel_all

log = logging.getLogger(__name__)

_BELONGS_TO_ANOTHER = (ErrorCode.LOAD_IN_PROGRESS, ErrorCode.ALREADY_LOADED)
UNDO_SECS = 60.0
"""How long an unload of a part may take after another one failed."""


class GroupLoads:
    """Checks the network between the neurons, loads the parts, and unloads them again if one fails."""

    def __init__(self, neurons: NeuronAccess, live: LiveConfig) -> None:
        self._neurons = neurons
        self._live = live

    @property
    def _timeout_secs(self) -> float:
        return self._live.config.cold_load.timeout_secs

    async def load(
        self, plan: LoadPlan, profile: ModelProfile, until_loaded: Callable[[ReplicaKey], Awaitable[object]]
    ) -> None:
        """Returns when the engine serves. `until_loaded` waits for one part, and raises LoadFailure.

        Raises:
            LoadFailure: a neuron cannot reach another, refuses its part, or a part failed; no part is left.
            LoadedElsewhere: another caller loads the model on one of the neurons; no part of this load is left.
            NodeRemoved, CommandAbandoned: a neuron left the configuration; no part is left on the others.

        If cancelled, the neurons continue the load. `GroupKeeper` ends it if not all parts have begun.
        """
        group, parts = secrets.token_hex(8), [plan, *plan.parts]
        at = await self._checked(plan.model_id, group, parts)
        begun: list[LoadPlan] = []
        try:
            # Rank 0 first: its neuron listens on the port where the parts meet until it has accepted the load.
            for rank, part in enumerate(parts):
                told = GroupPart(id=group, rank=rank, size=len(parts), master_addr=at.address, master_port=at.port)
                begun.append(part)  # also one whose neuron does not answer
                try:
                    await self._begin(plan, part, profile, told)
                except NeuronRefused as refused:
                    begun.remove(part)  # what runs there under its name belongs to another caller
                    if refused.code in _BELONGS_TO_ANOTHER:
                        await self._neurons.refresh(part.node)  # the next plan must know of it
                        raise LoadedElsewhere(part.node) from refused
                    failure = failure_of(part, refused)
                    failure.node = part.node
                    raise failure from refused
            await self._until_all_loaded(begun, until_loaded)
        except Exception:
            await self._undo(begun)
            raise

    async def _checked(self, model_id: str, group: str, parts: Sequence[LoadPlan]) -> ListenReply:
        """Where rank 0 waits for the others, once each neuron has reached all others.

        Raises:
            LoadFailure: names the neuron that cannot reach which.
        """
        heard = await asyncio.gather(*(self._listen(model_id, group, part.node) for part in parts))
        peers = [
            GroupPeer(node=part.node, address=at.address, port=at.port) for part, at in zip(parts, heard, strict=True)
        ]
        await asyncio.gather(*(self._reach(model_id, group, part.node, peers) for part in parts))
        return heard[0]

    async def _listen(self, model_id: str, group: str, node: str) -> ListenReply:
        try:
            return await self._neurons.client(node).listen_for_group(group)
        except (NeuronRefused, NeuronUnreachable) as error:
            raise _failed(model_id, node, str(error), BackoffCause.NODE) from error

    async def _reach(self, model_id: str, group: str, node: str, peers: Sequence[GroupPeer]) -> None:
        others = [peer for peer in peers if peer.node != node]
        try:
            reply = await self._neurons.client(node).reach_group(ReachCommand(group=group, peers=others))
        except (NeuronRefused, NeuronUnreachable) as error:
            raise _failed(model_id, node, str(error), BackoffCause.NODE) from error
        for peer in others:
            reason = reply.unreachable.get(peer.node)
            if reason is not None:
                where = f"neuron {node} cannot reach neuron {peer.node} at {peer.address} port {peer.port}: {reason}"
                raise _failed(model_id, peer.node, f"{where}; see [group] in neuron.toml", BackoffCause.NODE)

    async def _begin(self, plan: LoadPlan, part: LoadPlan, profile: ModelProfile, group: GroupPart) -> None:
        """Has one neuron accept its part.

        Raises:
            NeuronRefused: it does not. LoadFailure: it cannot be reached.
        """
        assert plan.whole is not None
        client = self._neurons.client(part.node)
        loras = self._live.catalogue.loras(plan.model_id)
        command = part_command(part, plan.whole, profile, self._neurons.node(part.node), group, loras=loras)
        try:
            load = client.load(command, timeout_secs=self._timeout_secs, wait=False)
            await unless_down(self._neurons.fleet, part.node, load)
        except NeuronUnreachable as error:
            raise _failed(plan.model_id, part.node, str(error), BackoffCause.TEMPORARY) from error
        await self._neurons.refresh(part.node)  # so that the fleet shows that it is loading

    async def _until_all_loaded(
        self, parts: Sequence[LoadPlan], until_loaded: Callable[[ReplicaKey], Awaitable[object]]
    ) -> None:
        async def until_one_is_loaded(part: LoadPlan) -> None:
            try:
                await until_loaded(part.key)
            except LoadFailure as failure:
                failure.node = part.node
                raise

        waiting = [asyncio.create_task(until_one_is_loaded(part), name=f"part on {part.node}") for part in parts]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            await cancel_all(waiting)

    async def _undo(self, parts: Sequence[LoadPlan]) -> None:
        await asyncio.gather(*(self._unload(part.key) for part in parts))

    async def _unload(self, key: ReplicaKey) -> None:
        model_id, node, instance = key
        try:
            unload = self._neurons.client(node).unload(model_id, instance, timeout_secs=UNDO_SECS)
            await unless_down(self._neurons.fleet, node, unload)
        except (NeuronRefused, NeuronUnreachable, NodeRemoved, CommandAbandoned) as error:
            log.info("the part of %s on %s is not unloaded: %s", model_id, node, error)
        await self._neurons.refresh(node)


def _failed(model_id: str, node: str, reason: str, cause: BackoffCause) -> LoadFailure:
    return LoadFailure(f"loading {model_id!r} on {node} failed: {reason}", cause, node=node)
