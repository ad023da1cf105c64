"""Finds an engine for a request, loading the model first if need be; keeps the table of what can be served at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from cortex.fleet import Fleet
from cortex.live_config import LiveConfig
from cortex.loader import Loader
from cortex.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.poller import NodeWatch
from cortex.replica import Failure, Replica, Route, unreachable
from cortex.routing import Await, InFlight, Load, Refuse, Serve, decide, serving_nodes
from cortex.snapshot import FleetSnapshot
from cortex.stopping import Stopping
from shared.errors import UpstreamError
from shared.protocol import EndpointReply, ModelStatus
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Decisions for one resolution. It normally takes two (load, serve); this ends a fleet that flaps."""

ENDPOINT_PATIENCE_SECS = 10.0
ENDPOINT_AGAIN_SECS = 0.25
"""A neuron that cannot be reached is asked again for so long, unless it counts as away before."""

_Version = tuple[object, object]
Subscriber = Callable[[str, tuple[Replica, ...]], None]


class Router:
    """`table` holds, by model id, every replica of the models that can be served without asking anybody. Its owner is
    this object; subscribers hear of each change."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        fleet: Fleet,
        loader: Loader,
        clients: Mapping[str, NeuronClient],
        watches: Mapping[str, NodeWatch],
        in_flight: InFlight,
        stopping: Stopping,
    ) -> None:
        self.table: dict[str, tuple[Replica, ...]] = {}
        self._live = live
        self._fleet = fleet
        self._loader = loader
        self._clients = clients
        self._watches = watches
        self._in_flight = in_flight
        self._stopping = stopping
        self._endpoints: dict[tuple[str, str], tuple[_Version, EndpointReply]] = {}
        self._wanted: set[str] = set()  # models that somebody has asked for: their endpoints are fetched in advance
        self._fetching: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._tasks = TaskSet()
        self._subscribers: list[Subscriber] = []

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._live.catalogue.aliases

    def knows(self, model_id: str) -> bool:
        """True for models of the catalogue."""
        return self._live.catalogue.profile(model_id) is not None

    async def resolve(self, model_id: str, failures: Sequence[Failure] = ()) -> Route:
        """An engine for one request. `failures` are the replicas that this request has been sent to in vain.

        Raises:
            ServiceError: it cannot be served now; the error is the client's.
        """
        given_up = {failure.replica.node for failure in failures if failure.replica.fresh}
        if failures:
            await self._look_again(failures[-1].replica)
        cold = False
        for _ in range(MAX_ROUNDS):
            decision = decide(model_id, self._live.catalogue, self._fleet.snapshot(), self._in_flight)
            match decision:
                case Serve(nodes):
                    left = [node for node in nodes if node not in given_up]
                    if not left:
                        break
                    self._wanted.add(model_id)
                    replica = await self._replica(model_id, left[0])
                    if replica is not None:
                        return Route(replica=replica, cold=cold)
                case Await(node):
                    cold = True
                    await self._stopping.unless_begun(self._until_settled(model_id, node))
                    given_up.discard(node)
                case Load():
                    cold = True
                    await self._stopping.unless_begun(self._until_loaded(decision))
                    given_up.discard(decision.node)
                case Refuse(error):
                    raise error
        raise unreachable(model_id, failures)

    async def _until_settled(self, model_id: str, node: str) -> None:
        if not await self._loader.join(model_id):
            await self._loader.wait_until_settled(model_id, node, timeout_secs=self._loader.timeout_secs)

    async def _until_loaded(self, load: Load) -> None:
        if not await self._loader.join(load.command.model_id):
            await self._loader.load(load)

    def forget(self, nodes: Collection[str]) -> None:
        """What these neurons told of their engines holds no more: they have left, or are elsewhere."""
        gone = [key for key in self._endpoints if key[1] in nodes]
        for key in gone:
            del self._endpoints[key]
        self.publish(self._wanted & {model_id for model_id, _ in gone})

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with a model and all its replicas whenever they change, none when it has to be asked for.
        The result ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    async def publish_loop(self) -> None:
        """Keeps the table true to the fleet, for ever."""
        with self._fleet.route_changes() as changes:
            self.publish(self._wanted)
            while True:
                self.publish(await changes.next() & self._wanted)

    def publish(self, models: Iterable[str]) -> None:
        """Makes the table true to the fleet's present state for these models."""
        fleet = self._fleet.snapshot()
        for model_id in models:
            replicas = self._replicas(model_id, fleet)
            if replicas == self.table.get(model_id, ()):
                continue
            if replicas:
                self.table[model_id] = replicas
            else:
                del self.table[model_id]
            for subscriber in self._subscribers:
                subscriber(model_id, replicas)

    async def close(self) -> None:
        await self._tasks.close()

    def _replicas(self, model_id: str, fleet: FleetSnapshot) -> tuple[Replica, ...]:
        """All replicas of a model, none unless the endpoint of each is known: a table with some of them would leave the
        others idle."""
        replicas: list[Replica] = []
        nodes = serving_nodes(model_id, fleet)
        for node in nodes:
            known = self._endpoints.get((model_id, node.name))
            version = self._version(fleet, model_id, node.name)
            if known is None or known[0] != version:
                self._fetch_ahead(model_id, node.name, version)
                continue
            replicas.append(_replica(model_id, node.name, known[1], fleet))
        return tuple(replicas) if len(replicas) == len(nodes) else ()

    def _fetch_ahead(self, model_id: str, node: str, version: _Version | None) -> None:
        key = model_id, node
        if version is not None and key not in self._fetching:
            task = self._tasks.spawn(self._fetch(model_id, node), name=f"endpoint of {model_id} on {node}")
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key))

    async def _fetch(self, model_id: str, node: str) -> None:
        try:
            await self._replica(model_id, node)
        except UpstreamError as error:
            log.info("%s", error.message)  # whoever asks for the model is told

    async def _replica(self, model_id: str, node: str) -> Replica | None:
        """The engine, asked for unless it is remembered. None when the model has just left the neuron, or the neuron is
        away. One that cannot be reached and does not count as away yet may be restarting, its engines working on: it is
        asked again.

        Raises:
            UpstreamError: the neuron lists the model as loaded and gives no endpoint.
        """
        patient_until = time.monotonic() + ENDPOINT_PATIENCE_SECS
        while True:
            fleet = self._fleet.snapshot()
            if node not in fleet.nodes:
                return None
            version = self._version(fleet, model_id, node)
            known = self._endpoints.get((model_id, node))
            if known is not None and known[0] == version:
                return _replica(model_id, node, known[1], fleet)
            client, watch = self._clients[node], self._watches[node]
            try:
                endpoint = await client.endpoint(model_id)
            except (NeuronRefused, NeuronUnreachable) as error:
                await watch.refresh()
                if self._clients.get(node) is not client:
                    continue
                now = self._fleet.snapshot().nodes[node]
                if not now.healthy or now.status_of(model_id) is not ModelStatus.LOADED:
                    return None
                if isinstance(error, NeuronRefused) or time.monotonic() >= patient_until:
                    raise UpstreamError(
                        f"{node} gives no endpoint for {model_id!r}: {error}", code="endpoint_unresolved"
                    ) from error
                await asyncio.sleep(ENDPOINT_AGAIN_SECS)
                continue
            if self._clients.get(node) is not client:  # it was another configuration's neuron that answered
                continue
            if version is not None:
                self._endpoints[model_id, node] = version, endpoint
                self.publish(self._wanted & {model_id})
            return _replica(model_id, node, endpoint, self._fleet.snapshot(), fresh=True)

    async def _look_again(self, failed: Replica) -> None:
        """After a replica gave no answer: its endpoint is asked for again, and its neuron what became of it."""
        key = failed.model_id, failed.node
        known = self._endpoints.get(key)
        if known is not None and known[1].url == failed.url:
            del self._endpoints[key]
            self.publish(self._wanted & {failed.model_id})
        watch = self._watches.get(failed.node)
        if watch is not None:
            await watch.refresh()

    def _version(self, fleet: FleetSnapshot, model_id: str, node: str) -> _Version | None:
        """What an endpoint stays good for. None when that cannot be told: a seed neuron says nothing that tells a
        reload, and an entry made here right after a load has no `since` until the neuron's own word replaces it."""
        snapshot = fleet.nodes[node]
        view = snapshot.models.get(model_id)
        if view is None or view.since is None:
            return None
        return view.since, None if snapshot.discovery is None else snapshot.discovery.instance_id


def _replica(
    model_id: str, node: str, endpoint: EndpointReply, fleet: FleetSnapshot, *, fresh: bool = False
) -> Replica:
    activity = fleet.nodes[node].activity.get(model_id)
    reported = 0 if activity is None else activity.in_flight + activity.queue_depth
    return Replica(
        model_id=model_id, node=node, url=endpoint.url, api_key=endpoint.api_key, reported=reported, fresh=fresh
    )
