"""Finds an engine for a request, and waits for the model to be loaded if necessary."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.config.aliases import Rewrite
from cortex.config.live import LiveConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.decision import Await, Place, Refuse, Serve, context_bound, decide
from cortex.control.demand import Demand
from cortex.control.loads.served_contexts import ServedContexts
from cortex.control.route_table import RouteTable
from cortex.control.scheduler import Scheduler
from cortex.control.shutdown import Shutdown
from cortex.control.wait_note import waiting_note
from cortex.fleet.membership import Refreshable
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.fleet.store import StateFile
from cortex.http.errors import shutting_down
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.control import ContextBound
from cortex.routing.replica import Failure, Replica, ReplicaKey, Route, WaitNote, given_up, unreachable, untried_first
from cortex.routing.request_limits import RequestLimits
from cortex.routing.response_owners import ResponseOwners
from shared.errors import ServiceError, Unavailable, UpstreamError
from shared.protocol import ErrorCode, ModelStatus, ModelView
from shared.retry_after import LOAD_TIMED_OUT_SECS
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
        self._clock = clock
        self._chosen: Counter[ReplicaKey] = Counter()
        self._limits = RequestLimits()

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

    async def context_bound(self, model_id: str) -> ContextBound | None:
        """As `routing.control.Control.context_bound`. Waits as `engine`."""
        if self._fleet.snapshot().serving(model_id):
            return None
        await self._fleet.until_all_polled()
        fleet = self._fleet.snapshot()
        if fleet.serving(model_id) or fleet.loading_on(model_id) is not None:
            return None
        return context_bound(model_id, self._live.catalogue, self.contexts.longest)

    async def resolve(self, model_id: str, failures: Sequence[Failure] = (), caller: Caller = ANONYMOUS) -> Route:
        """An engine for one request. `failures` are the replicas that did not answer this request.

        Raises:
            ServiceError: it cannot be served now; the error is for the client. No other exception is raised.
        """
        try:
            return await self._resolve(model_id, failures, caller)
        except ServiceError:
            raise
        except Exception as error:
            log.exception("bug while finding an engine for %s", model_id)
            raise ServiceError("internal error; see cortex's log") from error

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
        return not self._queue.count(*self._names_for(replica.key)) and self._limits.take(replica)

    def release(self, replica: Replica, count: int = 1) -> None:
        self._limits.release(replica, count)
        for name in self._live.catalogue.names_of(replica.model_id):
            self._queue.notify_first(name, count)

    def tell_owner(self, response_id: str, replica: Replica) -> None:
        self._state.add_response(response_id, replica)

    def note(self, model_id: str) -> WaitNote:
        """What a client that waits for the model may be told now."""
        fleet, job = self._fleet.snapshot(), self._scheduler.job(model_id)
        return waiting_note(model_id, fleet, job, self._scheduler.wait_reason(model_id), time.time())

    async def _resolve(self, model_id: str, failures: Sequence[Failure], caller: Caller) -> Route:
        lost = given_up(failures)
        if failures:
            await self._check_failed(failures[-1])
            await self._until_noticed(model_id, failures, lost)
        replica = await self._serving(model_id, failures, lost, queued=False)
        if replica is not None:
            return Route(replica=replica)
        return await self._when_served(model_id, failures, lost, caller)

    async def _when_served(
        self, model_id: str, failures: Sequence[Failure], lost: set[ReplicaKey], caller: Caller
    ) -> Route:
        """Waits in the queue until the model can be served: it must be loaded, or has as many requests as its neurons
        allow. Runs in the caller's own task: another task that ran between the decision and the in-flight count could
        evict the model as idle."""
        if self._shutdown.begun:
            raise shutting_down()
        deadline = self._clock() + self._live.config.cold_load.timeout_secs
        self._demand.record_request(self._live.catalogue.requested(model_id).model_id)
        with self._queue.ticket(model_id, self._scheduler.retry_after, caller) as ticket:
            cold = False
            while True:
                if not self._fleet.snapshot().serving(model_id):
                    cold = True
                    self._scheduler.ensure_scheduled(model_id)
                try:
                    await ticket.wait(within_secs=deadline - self._clock())
                except asyncio.TimeoutError:
                    raise self._took_too_long(model_id) from None
                lost &= self._serving_keys(model_id)
                replica = await self._serving(model_id, failures, lost, queued=True)
                if replica is not None:
                    ticket.admitted = True
                    self._demand.record_admission(self._live.catalogue.requested(model_id).model_id)
                    return Route(replica=replica, cold=cold)
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
                case Serve(replicas):
                    left = [key for key in untried_first(replicas, failures) if key not in lost]
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
                    if (
                        replica is not None
                        and replica.key in self._serving_keys(model_id)
                        and self._limits.take(replica)
                    ):
                        return replica
                case Await() | Place():
                    return None
                case Refuse(error):
                    raise error
        raise unreachable(model_id, failures)

    def _has_room(self, key: ReplicaKey, *, queued: bool) -> bool:
        """Whether the node's limit allows another request. One that arrives does not overtake those that wait."""
        engine = self._fleet.snapshot().engine(key)
        limit = None if engine is None else engine.limit
        if limit is not None and not queued and self._queue.count(*self._names_for(key)):
            return False
        return self._limits.has_room(key, limit)

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
        tables = [self.table.get(name, ()) for name in self._names_for(replica.key)]
        return any(each.key == replica.key and each.url != replica.url for table in tables for each in table)

    def _took_too_long(self, model_id: str) -> ServiceError:
        if self._fleet.snapshot().serving(model_id):
            secs = self._live.config.cold_load.timeout_secs
            message = f"{model_id!r} has as many requests as its neurons allow; none ended within {secs:g} s"
            return Unavailable(message, code=ErrorCode.UNAVAILABLE, retry_after=LOAD_TIMED_OUT_SECS)
        reason = self._scheduler.wait_reason(model_id)
        why = f" ({reason})" if reason else ""
        secs = self._live.config.cold_load.timeout_secs
        message = f"loading {model_id!r} timed out after {secs:g} s{why}"
        return Unavailable(message, code=ErrorCode.COLD_LOAD_FAILED, retry_after=LOAD_TIMED_OUT_SECS)

    async def _check_failed(self, failure: Failure) -> None:
        """After a replica failed: asks its neuron for the model's state. Forgets the endpoint if nothing listens there.
        A busy engine keeps its endpoint: other requests should not wait because this one timed out."""
        self._routes.invalidate(failure)
        poller = self._pollers.get(failure.replica.node)
        if poller is not None:
            await poller.refresh()

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
