"""The route table: the replicas of every model that workers can use without asking the control."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from cortex.control.endpoints import Endpoint, Endpoints
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.worker_counts import CountTotals
from cortex.proxy.balancing.choice import beyond_ours
from cortex.upstream.replica import Replica
from shared.errors import UpstreamError
from shared.tasks import TaskSet

log = logging.getLogger(__name__)

Subscriber = Callable[[str, tuple[Replica, ...]], None]


class RouteTable:
    """Owns `table`, from model id to replicas, and passes each change to its subscribers."""

    def __init__(self, *, fleet: Fleet, endpoints: Endpoints, counts: CountTotals) -> None:
        self.table: dict[str, tuple[Replica, ...]] = {}
        self._fleet = fleet
        self._endpoints = endpoints
        self._counts = counts
        self._wanted: set[str] = set()  # requested at least once: their endpoints are fetched ahead
        self._fetching: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._tasks = TaskSet()
        self._subscribers: list[Subscriber] = []

    async def replica(self, model_id: str, node: str) -> Replica | None:
        """The engine that serves the model on this node. None and errors as `Endpoints.fetch`."""
        self._wanted.add(model_id)
        endpoint = await self._endpoints.fetch(model_id, node)
        if endpoint is None:
            return None
        if endpoint.fresh:
            self.publish([model_id])
        return self._as_replica(model_id, node, endpoint, self._fleet.snapshot())

    def invalidate(self, failed: Replica) -> None:
        """No engine answers at this replica's URL."""
        if self._endpoints.invalidate(failed.model_id, failed.node, failed.url):
            self.publish([failed.model_id])

    def forget(self, nodes: Collection[str]) -> None:
        """Drops the endpoints of neurons that were removed or moved."""
        self.publish(self._endpoints.forget(nodes))

    async def settle(self) -> None:
        """Returns when every worker has the current table and has reported its counts since."""
        self.publish(self._wanted)
        await self._counts.refresh()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with a model and all its replicas on each change; an empty tuple means: ask the control.
        The result ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def publish(self, models: Iterable[str] | None = None) -> None:
        """Brings the table up to date with the fleet, for these models that have been requested (default: all)."""
        fleet = self._fleet.snapshot()
        for model_id in self._wanted if models is None else self._wanted.intersection(models):
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
        """All replicas of a model, or none while an endpoint is unknown: a partial list would leave the others idle."""
        replicas: list[Replica] = []
        nodes = fleet.serving(model_id)
        for node in nodes:
            known = self._endpoints.known(fleet, model_id, node.name)
            if known is None:
                self._fetch_ahead(model_id, node.name, fleet)
                continue
            replicas.append(self._as_replica(model_id, node.name, known, fleet))
        return tuple(replicas) if len(replicas) == len(nodes) else ()

    def _fetch_ahead(self, model_id: str, node: str, fleet: FleetSnapshot) -> None:
        key = model_id, node
        if self._endpoints.can_remember(fleet, model_id, node) and key not in self._fetching:
            task = self._tasks.spawn(self._fetch(model_id, node), name=f"endpoint of {model_id} on {node}")
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key))

    async def _fetch(self, model_id: str, node: str) -> None:
        try:
            _ = await self.replica(model_id, node)
        except UpstreamError as error:
            log.info("%s", error.message)  # the next request for the model gets the error

    def _as_replica(self, model_id: str, node: str, endpoint: Endpoint, fleet: FleetSnapshot) -> Replica:
        """`others` is what the neuron last reported beyond our own requests, which are counted at that same moment: a
        replica is published again with each report."""
        snapshot = fleet.nodes.get(node)
        activity = None if snapshot is None else snapshot.activity.get(model_id)
        others = 0
        if activity is not None:
            others = beyond_ours(activity.in_flight, activity.queue_depth, self._counts.in_flight(model_id, node))
        return Replica(
            model_id=model_id,
            node=node,
            url=endpoint.url,
            api_key=endpoint.api_key,
            others=others,
            fresh=endpoint.fresh,
        )
