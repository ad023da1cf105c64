"""The URLs of engines, as their neurons report them. Caches an endpoint for as long as it is valid."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cortex.fleet.engine_url import reachable
from cortex.fleet.members.membership import NeuronCommands, Refreshable
from cortex.fleet.neuron_client import NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.routing.replica import LOST, Failure, ReplicaKey
from shared.errors import UpstreamError
from shared.protocol import EndpointReply, ErrorCode
from shared.subscribers import Subscribers

PATIENCE_SECS = 10.0
RETRY_SECS = 0.25
"""How long to retry a neuron that cannot be reached, unless it is down before that."""


@dataclass(frozen=True)
class Endpoint:
    """Where an engine answers. `fresh`: the neuron was just asked for it. `may_move`: the neuron was asked earlier and
    does not tell when its engines move (protocol v1)."""

    url: str
    api_key: str | None
    fresh: bool = False
    may_move: bool = False


class _Remembered(NamedTuple):
    """A neuron's answer. It holds for this `engine_version`."""

    reply: EndpointReply
    version: object


class Endpoints:
    """The cached endpoints, by model id and replica.

    Our neurons send an endpoint with the model's status, so it is known the moment a load ends. Other neurons are asked
    once, and again when the model's entry changes (`engine_version`) or a request fails at the endpoint.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        clients: Mapping[str, NeuronCommands],
        pollers: Mapping[str, Refreshable],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._clients = clients
        self._pollers = pollers
        self.refusals: Subscribers[[ReplicaKey, str]] = Subscribers()
        """Announces a neuron's refusal to give the endpoint of a model that it says it has loaded, and its reason."""
        self._clock = clock
        self._known: dict[str, dict[ReplicaKey, _Remembered]] = {}
        self._invalidated: dict[ReplicaKey, EndpointReply] = {}
        self._given: set[ReplicaKey] = set()  # neurons have given an endpoint since the last refusal

    def known(self, fleet: FleetSnapshot, key: ReplicaKey) -> Endpoint | None:
        """The endpoint, if it is known without asking the neuron."""
        model_id, node, instance = key
        remembered = self._known.get(model_id, {}).get(key)
        snapshot = fleet.nodes[node]
        if remembered is not None and remembered.version == snapshot.engine_version(model_id, instance):
            reply = remembered.reply
            return Endpoint(reply.url, reply.api_key, may_move=snapshot.instance_id is None)
        view = snapshot.view(model_id, instance)
        told = None if view is None else view.endpoint
        if told is None or self._invalidated.get(key) == told:
            return None
        try:
            found = reachable(told, snapshot.endpoint)
        except ValueError:
            return None
        return Endpoint(found.url, found.api_key)

    async def fetch(self, key: ReplicaKey) -> Endpoint | None:
        """The endpoint, asking the neuron unless it is known. None if the engine has just left the neuron or the neuron
        is down. A neuron that cannot be reached but is not down yet may be restarting while its engines continue to
        serve: it is asked again.

        Raises:
            UpstreamError: the neuron lists the model as loaded but gives no endpoint.
        """
        model_id, node, instance = key
        deadline, refused_before = self._clock() + PATIENCE_SECS, False
        while True:
            fleet = self._fleet.snapshot()
            if node not in fleet.nodes:
                return None
            known = self.known(fleet, key)
            if known is not None:
                return known
            asked = fleet.nodes[node].engine_version(model_id, instance)
            client, poller = self._clients[node], self._pollers[node]
            try:
                reply = await client.endpoint(model_id, instance)
            except (NeuronRefused, NeuronUnreachable) as error:
                refused = isinstance(error, NeuronRefused)
                if refused:
                    self._refused(key, str(error))
                await poller.refresh()
                if self._clients.get(node) is not client:
                    continue
                fleet = self._fleet.snapshot()
                now = fleet.nodes[node]
                view = now.view(model_id, instance)
                if not now.healthy or view is None or not view.loaded:
                    return None
                loaded_again = now.engine_version(model_id, instance) != asked
                if (refused_before and refused and not loaded_again) or self._clock() >= deadline:
                    message = f"{key.name} gives no endpoint for {model_id!r}: {error}"
                    raise UpstreamError(message, code=ErrorCode.ENDPOINT_UNRESOLVED) from error
                if refused_before or not refused:
                    await asyncio.sleep(RETRY_SECS)
                refused_before = refused  # it may have been loaded again before the listing was asked for
                continue
            if self._clients.get(node) is not client:  # the reply came from a neuron of the previous configuration
                continue
            self._given.add(key)
            if asked is not None:
                self._known.setdefault(model_id, {})[key] = _Remembered(reply, asked)
            return Endpoint(reply.url, reply.api_key, fresh=True)

    def _refused(self, key: ReplicaKey, reason: str) -> None:
        """A neuron that gave an endpoint before may have unloaded the model by itself: only the next refusal counts."""
        if key in self._given:
            self._given.discard(key)
        else:
            self.refusals.announce(key, reason)

    def invalidate(self, failure: Failure) -> bool:
        """A request failed at this replica: ask the neuron before the next request goes there. True if its URL was
        the cached one. A busy engine keeps its endpoint, as other requests should not wait because one timed out;
        unless it may have moved."""
        key, fleet = failure.replica.key, self._fleet.snapshot()
        known = self.known(fleet, key) if key.node in fleet.nodes else None
        if known is None or known.url != failure.replica.url:
            return False
        if failure.kind not in LOST and not known.may_move:
            return False
        self._drop(key)
        engine = fleet.engine(key)
        if engine is not None and engine.view.endpoint is not None:
            self._invalidated[key] = engine.view.endpoint
        return True

    def forget_unloaded(self, fleet: FleetSnapshot, model_id: str) -> None:
        """Drops the endpoints of engines that are no longer loaded: the model may come back elsewhere on the host, with
        an entry like the one before."""
        for key in list(self._known.get(model_id, ())):
            engine = fleet.engine(key)
            if engine is None or not engine.view.loaded:
                self._drop(key)

    def forget(self, nodes: Collection[str]) -> set[str]:
        """Drops the endpoints of neurons that were removed or moved. Returns the models that had one there."""
        gone = [key for known in self._known.values() for key in known if key.node in nodes]
        for key in gone:
            self._drop(key)
        for key in [key for key in self._invalidated if key.node in nodes]:
            del self._invalidated[key]
        self._given = {key for key in self._given if key.node not in nodes}
        return {key.model_id for key in gone}

    def _drop(self, key: ReplicaKey) -> None:
        known = self._known.get(key.model_id, {})
        known.pop(key, None)
        if not known:
            self._known.pop(key.model_id, None)
