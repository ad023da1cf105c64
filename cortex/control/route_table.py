"""The route table: the replicas of every model that workers can use without asking the control."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from cortex.control.endpoints import Endpoint, Endpoints
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.choice import beyond_ours
from cortex.routing.replica import Failure, Replica, ReplicaKey, ServedPaths
from shared.errors import UpstreamError
from shared.protocol import ModelView
from shared.subscribers import Subscribers
from shared.tasks import TaskSet

log = logging.getLogger(__name__)


class RouteTable:
    """Owns `table`, from the name of a model (an id, also an adapter's, or `id@variant`) to replicas. `changes`
    announces a name and its replicas; an empty tuple means: ask the control."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        endpoints: Endpoints,
        counts: CountTotals,
        limit: Callable[[EngineSnapshot | None], int | None],
    ) -> None:
        self.table: dict[str, tuple[Replica, ...]] = {}
        self._fleet = fleet
        self._endpoints = endpoints
        self._counts = counts
        self._limit = limit
        self._wanted: set[str] = set()  # requested at least once: their endpoints are fetched ahead
        self._fetching: dict[ReplicaKey, asyncio.Task[Endpoint | UpstreamError | None]] = {}
        self._tasks = TaskSet()
        self.changes: Subscribers[[str, tuple[Replica, ...]]] = Subscribers()
        self.retired: Subscribers[[str]] = Subscribers()
        """Announces the URL of an engine that gets no requests any more. An idle connection to it would make it look
        busy to a neuron that knows no more of its engine's requests than its connections."""

    async def replica(self, key: ReplicaKey, name: str) -> Replica | None:
        """This engine, for a request that names the model so, and where it answers. None and errors as
        `Endpoints.fetch`."""
        self._wanted.add(name)
        if name not in self.table:
            self.publish([name])  # asks for the endpoints of all its replicas, not only of this one
        fleet = self._fleet.snapshot()
        endpoint = self._endpoints.known(fleet, key) if key.node in fleet.nodes else None
        if endpoint is None:
            found = await asyncio.shield(self._fetch(key))
            if isinstance(found, UpstreamError):
                raise found
            if found is None:
                return None
            endpoint = found
        return self._as_replica(key, endpoint, self._fleet.snapshot(), name)

    def invalidate(self, failure: Failure) -> None:
        """A request failed at this replica."""
        if self._endpoints.invalidate(failure):
            self.publish([failure.replica.model_id])

    def forget(self, nodes: Collection[str]) -> None:
        """Drops the endpoints of neurons that were removed or moved."""
        self.publish(self._endpoints.forget(nodes))

    async def settle(self) -> None:
        """Returns when every worker has the current table and has reported its counts since."""
        self.publish(self._wanted)
        await self._counts.refresh()

    def publish(self, models: Iterable[str] | None = None) -> None:
        """Brings the table up to date with the fleet, for these models that have been requested (default: all). Asks
        for the endpoints that are not known, so that requests need not wait for them."""
        fleet = self._fleet.snapshot()
        for name in list(self._wanted) if models is None else self._wanted_names(fleet, models):
            self._endpoints.forget_unloaded(fleet, fleet.catalogue.requested(name).model_id)
            for engine in fleet.serving(name):
                if self._endpoints.known(fleet, engine.key) is None:
                    _ = self._fetch(engine.key)
            self._update(name, fleet)

    def _wanted_names(self, fleet: FleetSnapshot, models: Iterable[str]) -> set[str]:
        """Of these models, the names that were requested, with those of their variants."""
        if fleet.catalogue.has_other_names:
            models = {name for model in models for name in fleet.catalogue.names_of(model)}
        return self._wanted.intersection(models)

    def _update(self, name: str, fleet: FleetSnapshot) -> None:
        replicas, before = self._replicas(name, fleet), self.table.get(name, ())
        if replicas == before:
            return
        if replicas:
            self.table[name] = replicas
        else:
            del self.table[name]
        self.changes.announce(name, replicas)
        serving = {engine.key for engine in fleet.serving(fleet.catalogue.requested(name).name)}
        for replica in before:
            if replica.key not in serving:
                self.retired.announce(replica.url)

    async def close(self) -> None:
        await self._tasks.close()

    def _replicas(self, name: str, fleet: FleetSnapshot) -> tuple[Replica, ...]:
        """All replicas of a model, or none while an endpoint is unknown: a partial list would leave the others idle."""
        replicas: list[Replica] = []
        for engine in fleet.serving(name):
            known = self._endpoints.known(fleet, engine.key)
            if known is None:
                return ()
            replicas.append(self._as_replica(engine.key, known, fleet, name))
        return tuple(replicas)

    def _fetch(self, key: ReplicaKey) -> asyncio.Task[Endpoint | UpstreamError | None]:
        """Asks for an endpoint; requests that need it meanwhile share the answer."""
        if key not in self._fetching:
            task = self._tasks.spawn(self._ask(key), name=f"endpoint of {key.model_id} on {key.name}")
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key))
        return self._fetching[key]

    async def _ask(self, key: ReplicaKey) -> Endpoint | UpstreamError | None:
        """The error is a value: there may be no request to raise it in."""
        try:
            endpoint = await self._endpoints.fetch(key)
        except UpstreamError as error:
            log.info("%s", error.message)
            return error
        if endpoint is not None:
            fleet = self._fleet.snapshot()
            for name in self._wanted_names(fleet, [key.model_id]):
                self._update(name, fleet)
        return endpoint

    def _as_replica(self, key: ReplicaKey, endpoint: Endpoint, fleet: FleetSnapshot, name: str) -> Replica:
        """`name`: of the model, in requests. `others` is what the neuron last reported beyond our own requests, which
        are counted at that same moment: a replica is published again with each report."""
        engine = fleet.engine(key)
        activity = None if engine is None else engine.activity
        others = 0
        if activity is not None:
            others = beyond_ours(activity.in_flight, activity.queue_depth, self._counts.in_flight(key))
        return Replica(
            key=key,
            name=key.name,
            url=endpoint.url,
            api_key=endpoint.api_key,
            others=others,
            fresh=endpoint.fresh,
            may_move=endpoint.may_move,
            limit=self._limit(engine),
            keep_alive_secs=None if engine is None else engine.view.keep_alive_secs,
            missing_paths=() if engine is None else tuple(engine.view.missing_paths),
            served=None if engine is None else _served(engine.view),
            adapter=name if name in fleet.catalogue.adapters else None,
            variant="" if engine is None else engine.view.variant or "",
        )


def _served(view: ModelView) -> ServedPaths | None:
    return None if view.paths is None else ServedPaths((view.harness or "unknown",), tuple(view.paths))
