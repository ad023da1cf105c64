"""Finds an engine for a request, and waits for the model to be loaded if necessary."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.limits.limiter import LimitOwner
from cortex.config.aliases import Rewrite
from cortex.config.live import LiveConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.decision import Attach, Await, Place, Refuse, Serve, attachable, context_bound, decide, served_paths
from cortex.control.demand import Demand
from cortex.control.loads.adapters import AdapterLoads, AdapterNotLoaded
from cortex.control.loads.engine_room import EngineRoom
from cortex.control.loads.served_contexts import ServedContexts
from cortex.control.route_table import RouteTable
from cortex.control.scheduler import Scheduler
from cortex.control.shutdown import Shutdown
from cortex.control.wait_note import waited_too_long, waiting_note
from cortex.fleet.members.membership import Refreshable
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.fleet.store import StateFile
from cortex.http.errors import shutting_down
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.control import Prospect
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, WaitNote, given_up, unreachable, untried_first
from cortex.routing.response_owners import ResponseMaker, ResponseOwners
from shared.errors import ServiceError, UpstreamError, internal_error
from shared.protocol import ModelStatus, ModelView
from shared.tasks import timeout

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Decisions for one resolution. It normally takes two (load, serve); this bounds it when the fleet flaps."""

ENGINE_END_SECS = 2.0
"""How long a neuron may take to notice the end of an engine that no longer listens."""

DEAD_ENGINE_SECS = 10.0
"""The same for an engine that says that its core is dead: vLLM's server exits within a second of most answers with that
error, within 5 s of the others."""

END_NOTICED_SECS = 0.5
END_EXPLAINED_SECS = 1.0
"""How long the client of a lost stream waits until the neuron notices the engine's end, and then for its reason."""
ADAPTER_RETRY_SECS = 0.25
"""How often a request looks for an engine with room for its adapter."""


class Resolver:
    """What workers ask: `table` first, then `resolve`. `contexts`: what engines have served."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        fleet: Fleet,
        routes: RouteTable,
        scheduler: Scheduler,
        queue: AdmissionQueue,
        pollers: Mapping[str, Refreshable],
        counts: CountTotals,
        demand: Demand,
        shutdown: Shutdown,
        state: StateFile,
        contexts: ServedContexts,
        room: EngineRoom,
        adapters: AdapterLoads,
        limiter: LimitOwner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = routes.table
        self._live = live
        self._fleet = fleet
        self._routes = routes
        self._scheduler = scheduler
        self._queue = queue
        self._pollers = pollers
        self._counts = counts
        self._demand = demand
        self._shutdown = shutdown
        self._state = state
        self.contexts = contexts
        self._adapters = adapters
        self.limiter = limiter
        self._clock = clock
        self._chosen: Counter[ReplicaKey] = Counter()
        self._room = room

    @property
    def aliases(self) -> Mapping[str, Rewrite]:
        return self._live.catalogue.rewrites

    @property
    def down(self) -> Collection[str]:
        return self._fleet.down

    @property
    def response_owners(self) -> ResponseOwners:
        return self._state.response_owners

    def knows(self, model_id: str) -> bool:
        """True for models of the catalogue, and their variants."""
        return self._live.catalogue.profile(model_id) is not None

    async def prospect(self, model_id: str) -> Prospect:
        """As `routing.control.Control.prospect`. Waits as `engine`."""
        engines = self._engines_for(model_id)
        if self._fleet.snapshot().serving(engines):
            return Prospect()
        await self._fleet.until_all_polled()
        fleet, catalogue = self._fleet.snapshot(), self._live.catalogue
        if fleet.serving(engines):
            return Prospect()
        starts = fleet.loading_on(model_id) is not None
        context = None if starts else context_bound(model_id, catalogue, self.contexts.longest)
        return Prospect(context, served_paths(model_id, catalogue, fleet))

    async def resolve(
        self, model_id: str, failures: Sequence[Failure] = (), caller: Caller = ANONYMOUS, tokens: float = 0.0
    ) -> Route:
        """An engine for one request. `failures` are the replicas that did not answer this request.

        Raises:
            ServiceError: it cannot be served now; the error is for the client. No other exception is raised.
        """
        try:
            return await self._resolve(model_id, failures, caller, tokens)
        except ServiceError:
            raise
        except Exception as error:
            log.exception("bug while finding an engine for %s", model_id)
            raise internal_error() from error

    async def engine(self, key: ReplicaKey) -> Replica | None:
        """As `routing.control.Control.engine`. Right after a start it waits until the neurons have been asked."""
        await self._fleet.until_all_polled()
        for serving in self._serving_keys(key.model_id):
            if serving.name == key.name:  # an upgraded neuron gives the engine an instance
                with contextlib.suppress(UpstreamError):
                    return await self._routes.replica(serving, key.model_id)
        return None

    async def engine_end(self, replica: Replica) -> str | None:
        """As `routing.control.Control.engine_end`. A protocol v1 neuron reports no reason, so it is not waited for."""
        model_id, name, instance = replica.key
        node = self._fleet.snapshot().nodes.get(name)
        if node is None or not node.healthy:
            return None if node is None else f"neuron is down: {node.last_error}"
        if node.instance_id is None:
            return None
        with contextlib.suppress(asyncio.TimeoutError, NodeRemoved):
            async with timeout(END_NOTICED_SECS):
                await self._fleet.until(name, lambda now: _has_ended(now.view(model_id, instance)))
            async with timeout(END_EXPLAINED_SECS):
                await self._fleet.until(name, lambda now: _is_explained(now.view(model_id, instance)))
        engine = self._fleet.snapshot().engine(replica.key)
        if engine is None or engine.view.loaded:
            return None
        return engine.view.error or engine.view.reason

    def take(self, replica: Replica) -> bool:
        return not self._queue.has_line(*self._names_for(replica.key)) and self._room.take(replica)

    def release(self, replica: Replica, count: int = 1) -> None:
        self._room.release(replica, count)
        self._queue.notify_first(*self._names_for(replica.key), count=count)

    async def response_maker(self, response_id: str) -> ResponseMaker | None:
        return self.response_owners.find(response_id)

    def tell_owner(self, response_id: str, maker: ResponseMaker) -> None:
        self._state.add_response(response_id, maker)

    def note(self, model_id: str) -> WaitNote:
        """What a client that waits for the model may be told now."""
        engines, fleet = self._engines_for(model_id), self._fleet.snapshot()
        if engines != model_id and fleet.serving(engines):
            return self._adapters.note(model_id)
        job, reason = self._scheduler.job(engines), self._scheduler.wait_reason(engines)
        return waiting_note(engines, fleet, job, reason, time.time())

    async def _resolve(self, model_id: str, failures: Sequence[Failure], caller: Caller, tokens: float) -> Route:
        lost = given_up(failures)
        if failures:
            await self._check_failed(failures[-1])
            await self._until_noticed(self._engines_for(model_id), failures, lost)
        replica = await self._serving(model_id, failures, lost, queued=False)
        if replica is not None:
            return Route(replica=replica)
        return await self._when_served(model_id, failures, lost, caller, tokens)

    async def _when_served(
        self, model_id: str, failures: Sequence[Failure], lost: set[ReplicaKey], caller: Caller, tokens: float
    ) -> Route:
        """Waits in the queue until the model can be served: it must be loaded, or has as many requests as its neurons
        allow. Runs in the caller's own task: another task that ran between the decision and the in-flight count could
        evict the model as idle."""
        if self._shutdown.begun:
            raise shutting_down()
        since = self._clock()
        deadline = since + self._live.config.cold_load.timeout_secs
        self._demand.record_waiting(self._live.catalogue.requested(model_id).model_id, caller)
        engines = self._engines_for(model_id)
        with self._queue.ticket(engines, self._scheduler.retry_after, caller, tokens) as ticket:
            cold = False
            while True:
                patience, fleet = deadline - self._clock(), self._fleet.snapshot()
                lacks_adapter = bool(fleet.serving(engines)) and not fleet.serving(model_id)
                self._queue.set_in_line(ticket, not lacks_adapter)
                if lacks_adapter:  # no event says that another adapter is idle
                    patience = min(patience, ADAPTER_RETRY_SECS)
                elif not fleet.serving(engines):
                    cold = True
                    self._scheduler.ensure_scheduled(engines)
                try:
                    await ticket.wait(within_secs=patience)
                except asyncio.TimeoutError:
                    if self._clock() >= deadline:
                        raise self._took_too_long(model_id) from None
                lost &= self._serving_keys(engines)
                replica = await self._serving(model_id, failures, lost, queued=True)
                if replica is not None:
                    ticket.admitted = True
                    self._demand.record_admission(self._live.catalogue.requested(model_id).model_id)
                    return self._scheduler.route(replica, cold=cold, since=since)
                if self._shutdown.begun:
                    raise shutting_down()

    async def _serving(
        self, model_id: str, failures: Sequence[Failure], lost: set[ReplicaKey], *, queued: bool
    ) -> Replica | None:
        """An engine that serves the model now, taken; None if the request has to wait. Adds engines to `lost`.
        `queued`: it is this request's turn.

        Raises:
            ServiceError: the model cannot be served.
        """
        for _ in range(MAX_ROUNDS):
            if not self._fleet.snapshot().serving(model_id):
                # Right after a start, cortex would load what is loaded somewhere already.
                await self._fleet.until_all_polled()
            match decide(model_id, self._live.catalogue, self._fleet.snapshot(), self._assigned):
                case Attach(replicas):
                    left = [key for key in untried_first(replicas, failures) if key not in lost]
                    if not await self._attached(model_id, left, failures):
                        return None
                case Serve(replicas):
                    left = [key for key in untried_first(replicas, failures) if key not in lost]
                    others = self._untried_of_base(model_id, left, failures, lost)
                    if others and await self._attached(model_id, others, failures):
                        continue
                    if not left:
                        raise unreachable(model_id, failures)
                    left = [key for key in left if self._has_room(key, queued=queued)]
                    if not left:
                        return None
                    with self._choosing(left[0]):
                        replica = await self._routes.replica(left[0], model_id)
                    if replica is not None and self._is_failed_one(replica, failures):
                        lost.add(replica.key)
                        continue
                    # While its neuron was asked, the model may have been chosen for eviction.
                    if replica is not None and replica.key in self._serving_keys(model_id) and self._room.take(replica):
                        return replica
                case Await() | Place():
                    return None
                case Refuse(error):
                    raise error
        raise unreachable(model_id, failures)

    def _engines_for(self, model_id: str) -> str:
        """The name of the model whose engines serve it: of an adapter its base, otherwise the same."""
        return self._live.catalogue.requested(model_id).name

    def _untried_of_base(
        self, adapter: str, left: Sequence[ReplicaKey], failures: Sequence[Failure], lost: set[ReplicaKey]
    ) -> list[ReplicaKey]:
        """If the request has tried all of `left`, those with the adapter: the engines of its base that it has not
        tried. None for a model that is not an adapter."""
        tried = lost.union(failure.replica.key for failure in failures if failure.kind != "unknown")
        if not failures or not tried.issuperset(left):
            return []
        of_base = attachable(adapter, self._live.catalogue, self._fleet.snapshot(), self._assigned)
        return [key for key in of_base if key not in tried]

    async def _attached(self, adapter: str, keys: Sequence[ReplicaKey], failures: Sequence[Failure]) -> bool:
        """Has one of these engines load the adapter. False if none of them has room for it now.

        Raises:
            AdapterNotLoaded: none of them can load it. UpstreamError: there is none left.
        """
        if not keys:
            raise unreachable(adapter, failures)
        try:
            await self._adapters.load_at_one(keys, adapter)
        except AdapterNotLoaded as problem:
            if problem.full:
                return False
            raise
        return True

    def _has_room(self, key: ReplicaKey, *, queued: bool) -> bool:
        """Whether the node's limit allows another request. One that arrives does not overtake those that wait."""
        engine = self._fleet.snapshot().engine(key)
        limit = self._room.limit(engine)
        if limit is not None and not queued and self._queue.has_line(*self._names_for(key)):
            return False
        return self._room.has_room(key, limit)

    @contextlib.contextmanager
    def _choosing(self, key: ReplicaKey) -> Iterator[None]:
        """Counts a request from the choice of its engine, while its endpoint is awaited: the next request of a burst
        chooses another one."""
        self._chosen[key] += 1
        try:
            yield
        finally:
            self._chosen[key] -= 1
            if not self._chosen[key]:
                del self._chosen[key]

    def _assigned(self, key: ReplicaKey) -> int:
        return self._counts.in_flight(key) + self._chosen[key]

    def _is_failed_one(self, replica: Replica, failures: Sequence[Failure]) -> bool:
        """Whether the engine is one that this request was lost at. A protocol v1 neuron does not show a reload, but it
        was asked after the failure and gave the same URL again."""
        node = self._fleet.snapshot().nodes.get(replica.node)
        return (node is None or node.instance_id is None) and any(
            failure.kind in ("refused", "reset")
            and (failure.replica.key, failure.replica.url) == (replica.key, replica.url)
            for failure in failures
        )

    def _names_for(self, key: ReplicaKey) -> tuple[str, ...]:
        return self._fleet.snapshot().names_for(key)

    def _serving_keys(self, model_id: str) -> set[ReplicaKey]:
        return {engine.key for engine in self._fleet.snapshot().serving(model_id)}

    def _is_elsewhere(self, replica: Replica) -> bool:
        """The engine has another URL by now: it was started again."""
        tables = [self.table.get(name, ()) for name in self._live.catalogue.names_of(replica.model_id)]
        return any(each.key == replica.key and each.url != replica.url for table in tables for each in table)

    def _took_too_long(self, model_id: str) -> ServiceError:
        engines, secs = self._engines_for(model_id), self._live.config.cold_load.timeout_secs
        served = bool(self._fleet.snapshot().serving(engines))
        return waited_too_long(model_id, engines, secs, self._scheduler.wait_reason(engines), served=served)

    async def _check_failed(self, failure: Failure) -> None:
        """After a replica failed: asks its neuron for the model's state. Forgets the endpoint if nothing listens there.
        A busy engine keeps its endpoint: other requests should not wait because this one timed out."""
        self._routes.invalidate(failure)
        poller = self._pollers.get(failure.replica.node)
        if poller is not None:
            await poller.refresh()
        replica = failure.replica
        if failure.kind == "unknown" and replica.adapter is not None:  # its engine may have lost it
            with contextlib.suppress(AdapterNotLoaded):
                await self._adapters.load(replica.key, replica.adapter)

    async def _until_noticed(self, model_id: str, failures: Sequence[Failure], lost: set[ReplicaKey]) -> None:
        """If no engine of the model answers, waits a moment until a neuron reports that its engine stopped: a
        stopping engine closes its port some time before it exits, and the server of a dead core still listens. Removes
        the engines that ended from `lost`. (A protocol v1 neuron reports nothing by itself.)"""
        serving = {
            engine.key: engine.node.instance_id is not None for engine in self._fleet.snapshot().serving(model_id)
        }
        gone = Counter(failure.replica.key for failure in failures if failure.kind in ("refused", "reset"))
        dead = {f.replica.key for f in failures if f.kind == "dead" and not self._is_elsewhere(f.replica)}
        unanswering = lost | dead | {key for key, times in gone.items() if times > 1}
        if unanswering.issuperset(serving) and any(serving.values()):
            served, name, instance = min(key for key, reports in serving.items() if reports)
            with contextlib.suppress(asyncio.TimeoutError, NodeRemoved):
                async with timeout(DEAD_ENGINE_SECS if dead else ENGINE_END_SECS):
                    await self._fleet.until(name, lambda node: _has_ended(node.view(served, instance)))
            lost &= self._serving_keys(model_id)


def _has_ended(view: ModelView | None) -> bool:
    return view is None or not view.loaded


def _is_explained(view: ModelView | None) -> bool:
    """The neuron has found out why the engine ended."""
    return (
        view is None
        or view.error is not None
        or view.retry_at is not None
        or view.known_status is not ModelStatus.RECOVERING
    )
