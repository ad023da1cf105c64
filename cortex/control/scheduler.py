"""Decides what to load where and what to evict for it: runs the planner on the current state and hands its plans to
the loader."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cortex.config.live import LiveConfig
from cortex.config.profile import ModelProfile
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import SAMPLE_SECS, Demand
from cortex.control.load_backoff import BackoffCause, Backoffs
from cortex.control.load_failure import LoadFailure, cause_of, is_permanent
from cortex.control.loads.evictor import Evictor, NoLongerNeeded
from cortex.control.loads.loader import Loader, LoadJob
from cortex.control.loads.operator_plan import operator_plan
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import EngineSnapshot, Reservation
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.fleet.store import StateFile
from cortex.placement.fair_queue import LoadSchedule, schedule_loads
from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import LoadPlan
from cortex.placement.planner import best_plan, candidate_verdicts, plan_variant
from cortex.placement.replicas import ReplicaChanges, ReplicaRemoval, needs_reconciliation, reconcile_replicas
from cortex.routing.replica import ANY_NODE, ModelOnNode, Replica, ReplicaKey, Route
from shared.errors import Conflict, shortened
from shared.protocol import ErrorCode, ModelStatus, ModelView
from shared.request_ids import request_scope
from shared.retry_after import until_loaded
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)

RECHECK_SECS = 0.25
"""Upper bound between two decisions while requests wait: polls change the figures all the time."""

PAUSE_FACTOR = 4
"""Pause after planning, as a multiple of the time it took: planning takes at most a fifth of cortex's time, even in a
large fleet."""

BETTER_PLACE_SECS = 1.0
"""Interval at which a load that waits for busy models to drain looks for a better place."""
REMOVAL_RETRY_SECS = 60.0
"""How long to wait before retrying a failed removal: the model takes no requests during each attempt."""


@dataclass(frozen=True)
class Policy:
    """The two decisions of the scheduler: what to load for waiting requests, and which replicas to add or remove."""

    schedule_loads: Callable[[PlanningView], LoadSchedule]
    reconcile_replicas: Callable[[PlanningView, Iterable[ModelProfile]], ReplicaChanges]


PLANNER = Policy(schedule_loads, reconcile_replicas)


class Scheduler:
    """Starts every load and eviction: for waiting requests, as replicas, and for operators."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        fleet: Fleet,
        loader: Loader,
        evictor: Evictor,
        demand: Demand,
        backoffs: Backoffs,
        queue: AdmissionQueue,
        state: StateFile,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy = PLANNER,
    ) -> None:
        self._fleet = fleet
        self._live = live
        self._loader = loader
        self._evictor = evictor
        self._demand = demand
        self._backoffs = backoffs
        self._queue = queue
        self._state = state
        self._clock = clock
        self._policy = policy
        self._observed_share_mb: dict[str, int] = {}
        self._foreign_loads: set[ReplicaKey] = set()  # loads that others started and requests wait for
        self._removing: set[ReplicaKey] = set()
        self._schedule = LoadSchedule()
        self._wake = asyncio.Event()
        self._tasks = TaskSet()

    def view(self) -> PlanningView:
        """The current state, for planning."""
        return PlanningView(
            now=self._clock(),
            catalogue=self._live.catalogue,
            fleet=self._fleet.snapshot(),
            rules=self._live.config.placement.rules(),
            usages=self._demand.usages(),
            waiting=self._queue.waiting(),
            arrivals=self._demand.arrivals(),
            load_secs=self._loader.load_secs,
            observed_share_mb=self._observed_share_mb,
            backoffs=self._backoffs.current(),
            overloaded_since=self._demand.overloaded_since,
            holds=self._holds(),
            networks=self._live.networks,
            accounts=self._demand.accounts,
            displaced_by=self._demand.displaced_by,
        )

    def ensure_scheduled(self, model_id: str) -> None:
        """A request waits for a model: plans for it now unless that has been done."""
        coming = self._fleet.snapshot().loading_on(model_id)
        if coming is not None:
            self._expect_foreign_load(coming.key)
        elif self._loader.job(model_id) is None and model_id not in self._schedule.wait_reasons:
            self.schedule()
            self._wake.set()  # so that `run` knows when to decide again

    def schedule(self) -> None:
        """Starts the loads that can start for waiting requests, and refuses those that cannot be served. Waits until
        every neuron has been polled once."""
        if not self._queue.models:  # building a view has a cost, and the fleet changes all the time
            self._schedule = LoadSchedule()
            return
        if not self._fleet.all_polled:
            self._schedule = LoadSchedule(
                wait_reasons=dict.fromkeys(self._queue.models, "waiting for the first answer of a new neuron")
            )
            return
        self._schedule = schedule = self._policy.schedule_loads(self.view())
        for plan in schedule.loads:
            with request_scope(self._queue.first_request_id(*plan.requested.names)):
                self._start(plan, "requests wait for it")
        for model_id, error in schedule.rejected.items():
            self._queue.refuse(model_id, error)

    def retry_after(self, model_id: str) -> float:
        """Estimated seconds until the model is loaded."""
        job = self._loader.job(model_id)
        fleet, now = self._fleet.snapshot(), self._clock()
        progress = None if (coming := fleet.loading_on(model_id)) is None else coming.view.progress
        return until_loaded(
            remaining_secs=None if progress is None else progress.remaining_secs,
            expected_secs=None if job is None else job.plan.expected_secs,
            elapsed_secs=0.0 if job is None or job.loading_since is None else now - job.loading_since,
        )

    def route(self, replica: Replica, *, cold: bool, since: float) -> Route:
        """To this replica. `cold`: it was loaded for the request, which has waited since then."""
        phases = self._loader.phases(replica.model_id, replica.node, since=since) if cold else ()
        return Route(replica=replica, cold=cold, phases=phases)

    def job(self, model_id: str) -> LoadJob | None:
        """Our load of this model, if one is under way."""
        return self._loader.job(model_id)

    @property
    def held_back(self) -> Mapping[ModelOnNode, float]:
        """Until when operators hold models back, in Unix time."""
        return self._state.holds

    def wait_reason(self, model_id: str) -> str | None:
        """Why a model is not being loaded yet, as text."""
        return self._schedule.wait_reasons.get(model_id)

    async def run(self) -> None:
        """Plans whenever there may be something to do. Never returns."""
        while True:
            began = self._clock()
            self.schedule()
            await asyncio.sleep(PAUSE_FACTOR * (self._clock() - began))
            await self._until_due()

    async def reconcile_loop(self) -> None:
        """Samples the demand; keeps, adds and removes replicas. Never returns."""
        catalogue, fleet, profiles = None, None, list[ModelProfile]()
        while True:
            await asyncio.sleep(SAMPLE_SECS)
            await self._fleet.until_all_polled()  # a replica may be on a neuron that has not answered yet
            self._demand.sample(self._fleet.snapshot(), replica_target=self._live.config.placement.replica_target)
            self._demand.charge(self._fleet.snapshot(), self._queue.waiting())
            if self._live.catalogue is not catalogue or self._fleet.snapshot() is not fleet:
                catalogue, fleet = self._live.catalogue, self._fleet.snapshot()
                profiles = [each for each in catalogue.models if needs_reconciliation(each, fleet)]
            displaced = self._demand.displaced_if_due(catalogue)
            if profiles or displaced:
                steps = self._policy.reconcile_replicas(replace(self.view(), displaced=displaced), profiles)
                for plan, why in steps.loads:
                    self._start(plan, why, for_waiters=False)
                for removal in steps.removals:
                    self._start_removal(removal)

    def routes_changed(self, models: Iterable[str]) -> None:
        """These models may have moved, become available or failed."""
        fleet = self._fleet.snapshot()
        for model_id in models:
            for engine in fleet.engines(model_id):
                self._track_foreign_load(engine)
                if engine.view.loaded:
                    self._record_size(engine.view)
            self._queue.notify(*self._live.catalogue.names_of(model_id))
        self._wake.set()

    def load(self, model_id: str, node_name: str | None, instance: str | None = None) -> LoadJob | None:
        """An operator's load, on this neuron or the best one, of this instance or any: started at once, despite a
        backoff and without waiting for a schedule. None if another caller is already loading it there.

        Raises:
            ServiceError: it cannot be placed.
        """
        requested = self._live.catalogue.requested(model_id)
        self._backoffs.clear({requested.model_id, *self._live.catalogue.names_of(model_id)})
        if node_name is None and (job := self._loader.job(model_id)) is not None:
            job.needed = True
            return job
        plan = operator_plan(self.view(), model_id, node_name, instance)
        if plan is None:
            return None
        return self._start(plan, "an operator asked", for_waiters=False, leased=node_name is None)

    async def unload(self, key: ReplicaKey, *, drain: bool) -> None:
        """An operator's unload. `drain`: requests in flight finish first, for at most `cold_load.timeout_secs`. The
        model gets no new requests meanwhile. Raises as `Evictor.evict`, except NoLongerNeeded."""
        deadline = self._clock() + self._loader.timeout_secs
        self._demand.record_removed(key.model_id)
        with self._evictor.no_new_requests(key):
            await self._evictor.evict(key, method="unload", patient=lambda: drain and self._clock() < deadline)

    async def sleep(self, key: ReplicaKey) -> None:
        """An operator puts an engine to sleep, after its requests in flight as in `unload`. Raises as
        `Evictor.sleep`."""
        deadline = self._clock() + self._loader.timeout_secs
        self._demand.record_removed(key.model_id)
        with self._evictor.no_new_requests(key):
            await self._evictor.sleep(key, patient=lambda: self._clock() < deadline)

    async def restart(self, key: ReplicaKey, name: str, reservation: Reservation, *, drain: bool) -> LoadJob | None:
        """An operator has an engine of the model `name` unloaded and loaded again in the same place. Its memory stays
        reserved for it. Returns when the load has begun. Raises as `unload` and `load`, and Conflict if it
        is being started already."""
        if any(each.key == key for each in self._fleet.snapshot().reservations):
            message = f"{shortened(name)!r} on {key.name} is being started already: wait until it is loaded"
            raise Conflict(message, code=ErrorCode.LOAD_IN_PROGRESS)
        self._fleet.reserve(reservation)
        try:
            await self.unload(key, drain=drain)
        finally:
            self._fleet.release(reservation)
        return self.load(name, key.node, key.instance or None)

    async def close(self) -> None:
        await self._tasks.close()

    def _start(self, plan: LoadPlan, why: str, *, for_waiters: bool = True, leased: bool = True) -> LoadJob:
        checked_at = self._clock()

        def still_needed() -> bool:
            nonlocal checked_at
            if self._state.holds.keys() & {(plan.model_id, ANY_NODE), (plan.model_id, plan.node)}:
                return False
            if job.needed:
                return True
            if not self._queue.count(*plan.requested.names):
                return False
            if self._clock() - checked_at < BETTER_PLACE_SECS:
                return True
            checked_at = self._clock()
            return not self._has_better_place(plan)

        job = self._loader.start(plan, why, still_needed=still_needed, done=self._done, leased=leased)
        job.needed |= not for_waiters
        self._demand.record_displaced(plan.displaces, plan.key, self._queue.waiting_for(*plan.requested.names))
        return job

    def _holds(self) -> dict[ModelOnNode, float]:
        """Until when operators hold models back, on our clock."""
        offset = self._clock() - time.time()
        return {key: until + offset for key, until in self._state.holds.items()}

    def _has_better_place(self, plan: LoadPlan) -> bool:
        """Whether the model could be loaded elsewhere now without waiting for requests, while the evictions of `plan`
        still wait for some."""
        view = self.view()
        evicting = [each.resident.key for each in plan.eviction_plan.evictions]
        if not any(view.usage(key).in_flight for key in evicting):
            return False
        reservations = tuple(each for each in view.fleet.reservations if each.key != plan.key)
        fleet = replace(view.fleet, reservations=reservations, evicting=view.fleet.evicting.difference(evicting))
        view = replace(view, fleet=fleet)
        profile = view.profile(plan.model_id if self._queue.count(plan.model_id) else plan.requested.name)
        other = None if profile is None else best_plan(candidate_verdicts(view, profile))
        return other is not None and not other.eviction_plan.busy and other.ready_at <= view.now

    def _done(self, job: LoadJob, failure: LoadFailure | None) -> None:
        try:
            if failure is not None:
                self._note_failure(job, failure)
            elif job.elsewhere is not None:
                self._backoffs.record_load_elsewhere(job.model_id, job.elsewhere)
            elif any(engine.key == job.plan.key for engine in self._fleet.snapshot().serving(job.model_id)):
                self._backoffs.record_success(job.plan.requested, job.node)
        finally:
            self._queue.notify(*job.plan.requested.names)
            self._wake.set()

    def _note_failure(self, job: LoadJob, failure: LoadFailure) -> None:
        cause = failure.cause
        if failure.no_memory:
            if failure.needed_mb is not None and failure.needed_mb != job.plan.device_share_mb:
                self._observed_share_mb[job.plan.requested.name] = failure.needed_mb
            if self._plan_changed(job):  # another load took the memory first, as the current figures show
                cause = BackoffCause.TEMPORARY
        name = job.plan.requested.name
        self._backoffs.record_failure(name, failure.node or job.node, cause, str(failure), permanent=failure.permanent)

    def _plan_changed(self, job: LoadJob) -> bool:
        """Whether the planner would now choose something other than what the neuron refused."""
        view = self.view()
        profile = view.profile(job.plan.requested.name)
        node = view.fleet.nodes.get(job.node)
        found = None if profile is None or node is None else plan_variant(view, profile, node).plan
        return found is None or found.rank != job.plan.rank

    def _record_size(self, view: ModelView) -> None:
        """Records the memory the neuron booked for a model whose catalogue entry gives none."""
        profile = self._live.catalogue.profile(view.id)
        choice = None if profile is None else profile.choice(view.variant if profile.variants else None)
        if choice is not None and choice.vram_mb is None and (booked := view.vram_booked_mb or view.ram_booked_mb):
            self._observed_share_mb[choice.requested.name] = -(-booked // max(1, len(view.devices)))

    def _track_foreign_load(self, engine: EngineSnapshot) -> None:
        """Records how a load ends that others started and our requests wait for."""
        key, view = engine.key, engine.view
        if view.coming:
            if self._queue.count(*self._fleet.snapshot().names_for(key)):
                self._expect_foreign_load(key)
            return
        if key in self._foreign_loads:
            self._foreign_loads.discard(key)
            requested = self._live.catalogue.running(key.model_id, view.variant)
            if view.loaded:
                self._backoffs.record_success(requested, key.node)
            elif view.known_status is ModelStatus.FAILED:
                reason = f"loading {requested.name!r} on {key.node} failed: {view.error or 'no reason given'}"
                cause, permanent = cause_of(view), is_permanent(view)
                self._backoffs.record_failure(requested.name, key.node, cause, reason, permanent=permanent)

    def _expect_foreign_load(self, key: ReplicaKey) -> None:
        if all(job.plan.key != key for job in self._loader.jobs()):
            self._foreign_loads.add(key)

    def _start_removal(self, removal: ReplicaRemoval) -> None:
        key = removal.key
        if key not in self._removing:
            self._removing.add(key)
            self._fleet.begin_eviction(key)  # now: the next decision may be made before the task starts
            self._demand.record_removed(key.model_id)
            task = self._tasks.spawn(self._remove(removal), name=f"remove {key.model_id} on {key.name}")
            task.add_done_callback(lambda _: self._removing.discard(key))

    async def _remove(self, removal: ReplicaRemoval) -> None:
        key, retry_secs = removal.key, 0.0
        log.info("removing %s from %s: %s", key.model_id, key.name, removal.reason)
        try:
            await self._evictor.evict(
                key,
                method="sleep_if_idle" if removal.sleep else "unload",
                reason=removal.kind,
                still_needed=lambda: not self._queue.count(*self._live.catalogue.names_of(removal.model_id)),
            )
        except NoLongerNeeded:
            log.info("keeping %s on %s: it was requested again", key.model_id, key.name)
        except (NodeRemoved, CommandAbandoned):
            log.info("%s was removed from the configuration", key.node)
        except (NeuronRefused, NeuronUnreachable) as error:
            log.warning("removing %s from %s failed, it continues to serve: %s", key.model_id, key.name, error)
            retry_secs = REMOVAL_RETRY_SECS
        finally:
            self._fleet.end_eviction(key)
        await asyncio.sleep(retry_secs)

    async def _until_due(self) -> None:
        """Returns when a request waits, or when a waiting model may have become servable."""
        if not self._schedule.wait_reasons:
            await self._wake.wait()
        else:
            due = self._schedule.recheck_at
            pause = RECHECK_SECS if due is None else min(RECHECK_SECS, max(0.0, due - self._clock()))
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(pause):
                    await self._wake.wait()
        self._wake.clear()
