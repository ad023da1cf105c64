"""Finds an engine for a request, loading the model first if need be; keeps the table of what can be served at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from cortex.config.live import LiveConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import Demand
from cortex.control.routing import Await, Place, Refuse, Serve, decide
from cortex.control.scheduler import Scheduler
from cortex.control.wait_note import waiting_note
from cortex.fleet.neuron_client import NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.fleet.poller import NodeWatch
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet, NodeLeft
from cortex.http.stopping import Stopping, stopping
from cortex.metrics.worker_counts import CountTotals
from cortex.proxy.balancing.choice import beyond_ours
from cortex.upstream.replica import Failure, Replica, Route, WaitNote, given_up, unreachable, untried_first
from shared.errors import ServiceError, Unavailable, UpstreamError
from shared.protocol import EndpointReply, ModelStatus
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Decisions for one resolution. It normally takes two (load, serve); this ends a fleet that flaps."""

ENDPOINT_PATIENCE_SECS = 10.0
ENDPOINT_AGAIN_SECS = 0.25
"""A neuron that cannot be reached is asked again for so long, unless it counts as away before."""

RETRY_AFTER_TIMEOUT_SECS = 30
"""For who has waited in vain for as long as a load may take."""

ENGINE_END_SECS = 2.0
"""So long a neuron has to see the end of an engine that listens no more."""

_Version = tuple[object, object]
Subscriber = Callable[[str, tuple[Replica, ...]], None]


class Resolver:
    """`table` holds, by model id, every replica of the models that can be served without asking anybody. Its owner is
    this object; subscribers hear of each change."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        fleet: Fleet,
        scheduler: Scheduler,
        rooms: AdmissionQueue,
        clients: Mapping[str, NeuronClient],
        watches: Mapping[str, NodeWatch],
        counts: CountTotals,
        demand: Demand,
        stopping: Stopping,
    ) -> None:
        self.table: dict[str, tuple[Replica, ...]] = {}
        self._live = live
        self._fleet = fleet
        self._scheduler = scheduler
        self._rooms = rooms
        self._demand = demand
        self._stopping = stopping
        self._clients = clients
        self._watches = watches
        self._counts = counts
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
            ServiceError: it cannot be served now; the error is the client's. Nothing else: nobody would be told.
        """
        try:
            return await self._resolve(model_id, failures)
        except ServiceError:
            raise
        except Exception as error:
            log.exception("a bug in finding an engine for %s", model_id)
            raise ServiceError("internal error; cortex's log has the details") from error

    async def _resolve(self, model_id: str, failures: Sequence[Failure]) -> Route:
        lost = given_up(failures)
        if failures:
            await self._look_again(failures[-1])
            await self._until_told(model_id, failures, lost)
        replica = await self._serving(model_id, failures, lost)
        if replica is not None:
            return Route(replica=replica)
        return await self._when_loaded(model_id, failures, lost)

    async def _when_loaded(self, model_id: str, failures: Sequence[Failure], lost: set[str]) -> Route:
        """Waits in the model's room until it can be served. In the caller's own task: between the decision and the
        count of what is in flight nothing else may run, or the model could be displaced as idle."""
        if self._stopping.begun:
            raise stopping()
        patient_until = time.monotonic() + self._live.config.cold_load.timeout_secs
        self._demand.arrived(model_id)
        with self._rooms.seat(model_id, self._scheduler.retry_after) as seat:
            self._scheduler.want(model_id)
            while True:
                try:
                    await seat.news(within_secs=patient_until - time.monotonic())
                except asyncio.TimeoutError:
                    raise self._took_too_long(model_id) from None
                lost.intersection_update(node.name for node in self._fleet.snapshot().serving(model_id))
                replica = await self._serving(model_id, failures, lost)
                if replica is not None:
                    return Route(replica=replica, cold=True)
                if self._stopping.begun:
                    raise stopping()
                self._scheduler.want(model_id)

    async def _serving(self, model_id: str, failures: Sequence[Failure], lost: Collection[str]) -> Replica | None:
        """An engine that has the model now; None when it has to be waited for.

        Raises:
            ServiceError: it cannot be served.
        """
        for _ in range(MAX_ROUNDS):
            if not self._fleet.snapshot().serving(model_id):
                await self._fleet.surveyed()  # a cortex that has just started would load what is loaded somewhere
            match decide(model_id, self._live.catalogue, self._fleet.snapshot(), self._counts.in_flight):
                case Serve(nodes):
                    left = [node for node in untried_first(nodes, failures) if node not in lost]
                    if not left:
                        raise unreachable(model_id, failures)
                    self._wanted.add(model_id)
                    replica = await self._replica(model_id, left[0])
                    # It may have begun to make way for another while its neuron was asked.
                    if replica is not None and self._is_serving(replica):
                        return replica
                case Await() | Place():
                    return None
                case Refuse(error):
                    raise error
        raise unreachable(model_id, failures)

    def _is_serving(self, replica: Replica) -> bool:
        return any(node.name == replica.node for node in self._fleet.snapshot().serving(replica.model_id))

    def _took_too_long(self, model_id: str) -> ServiceError:
        waits_for = self._scheduler.note(model_id)
        why = f" ({waits_for})" if waits_for else ""
        secs = self._live.config.cold_load.timeout_secs
        message = f"{model_id!r} did not come up in {secs:g} s{why}"
        return Unavailable(message, code="cold_load_failed", retry_after=RETRY_AFTER_TIMEOUT_SECS)

    def forget(self, nodes: Collection[str]) -> None:
        """What these neurons told of their engines holds no more: they have left, or are elsewhere."""
        gone = [key for key in self._endpoints if key[1] in nodes]
        for key in gone:
            del self._endpoints[key]
        self.publish(self._wanted & {model_id for model_id, _ in gone})

    async def settle(self) -> None:
        """Returns when every worker knows the table as it is now, and its counts are those of after."""
        self.publish(self._wanted)
        await self._counts.refresh()

    def note(self, model_id: str) -> WaitNote:
        """What a client that waits for the model may be told now."""
        fleet, job = self._fleet.snapshot(), self._scheduler.job(model_id)
        return waiting_note(model_id, fleet, job, self._scheduler.note(model_id), time.time())

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with a model and all its replicas whenever they change, none when it has to be asked for.
        The result ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    async def publish_loop(self) -> None:
        """Keeps the table true to the fleet, for ever."""
        with self._fleet.route_changes() as changes:
            self.publish(self._wanted)
            self._scheduler.routes_changed(list(self._rooms.models))  # what a loop before this one has not told
            while True:
                models = await changes.next()
                self.publish(models & self._wanted)
                self._scheduler.routes_changed(models)

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
        nodes = fleet.serving(model_id)
        for node in nodes:
            known = self._endpoints.get((model_id, node.name))
            version = self._version(fleet, model_id, node.name)
            if known is None or known[0] != version:
                self._fetch_ahead(model_id, node.name, version)
                continue
            replicas.append(self._as_replica(model_id, node.name, known[1], fleet))
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
                return self._as_replica(model_id, node, known[1], fleet)
            client, watch = self._clients[node], self._watches[node]
            try:
                endpoint = await client.endpoint(model_id)
            except (NeuronRefused, NeuronUnreachable) as error:
                if isinstance(error, NeuronRefused):
                    self._scheduler.lost(model_id, node, str(error))
                await watch.refresh()
                if self._clients.get(node) is not client:
                    continue
                now = self._fleet.snapshot().nodes[node]
                if not now.healthy or now.status_of(model_id) is not ModelStatus.LOADED:
                    return None
                if version is not None and self._version(self._fleet.snapshot(), model_id, node) != version:
                    continue  # loaded again meanwhile
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
            return self._as_replica(model_id, node, endpoint, self._fleet.snapshot(), fresh=True)

    async def _look_again(self, failure: Failure) -> None:
        """After a replica gave no answer: its neuron is asked what became of it, and for its endpoint. That of an
        engine which is alive stays good: nobody else is to wait because one request found it busy."""
        failed = failure.replica
        key = failed.model_id, failed.node
        known = self._endpoints.get(key)
        if failure.kind in ("refused", "reset") and known is not None and known[1].url == failed.url:
            del self._endpoints[key]
            self.publish(self._wanted & {failed.model_id})
        watch = self._watches.get(failed.node)
        if watch is not None:
            await watch.refresh()

    async def _until_told(self, model_id: str, failures: Sequence[Failure], lost: set[str]) -> None:
        """Where no neuron is left but those whose engine does not answer, one of them has a moment to see that: an
        engine that was told to stop listens no more some time before it ends. Takes those that saw it out of `lost`. (A
        seed neuron tells nothing by itself.)"""
        serving = {node.name: node.instance is not None for node in self._fleet.snapshot().serving(model_id)}
        gone = Counter(failure.replica.node for failure in failures if failure.kind in ("refused", "reset"))
        deaf = lost | {node for node, times in gone.items() if times > 1}
        if deaf.issuperset(serving) and any(serving.values()):
            with contextlib.suppress(asyncio.TimeoutError, NodeLeft):
                async with timeout(ENGINE_END_SECS):
                    await self._fleet.until(
                        min(name for name, tells in serving.items() if tells),
                        lambda node: node.status_of(model_id) is not ModelStatus.LOADED,
                    )
            lost.intersection_update(node.name for node in self._fleet.snapshot().serving(model_id))

    def _version(self, fleet: FleetSnapshot, model_id: str, node: str) -> _Version | None:
        """What an endpoint stays good for. None when that cannot be told: a seed neuron says nothing that tells a
        reload, and an entry made here right after a load has no `since` until the neuron's own word replaces it."""
        snapshot = fleet.nodes[node]
        view = snapshot.models.get(model_id)
        if view is None or view.since is None:
            return None
        return view.since, None if snapshot.discovery is None else snapshot.discovery.instance_id

    def _as_replica(
        self, model_id: str, node: str, endpoint: EndpointReply, fleet: FleetSnapshot, *, fresh: bool = False
    ) -> Replica:
        """What a worker is told. A replica is told anew when its neuron reports another activity, so our requests are
        counted here at about the moment of the report."""
        activity = fleet.nodes[node].activity.get(model_id)
        others = 0
        if activity is not None:
            others = beyond_ours(activity.in_flight, activity.queue_depth, self._counts.in_flight(model_id, node))
        return Replica(
            model_id=model_id, node=node, url=endpoint.url, api_key=endpoint.api_key, others=others, fresh=fresh
        )
