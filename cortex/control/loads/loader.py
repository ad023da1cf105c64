"""Carries out plans: drains and evicts models, then loads the new one. At most one load of an engine. A load
continues when the request that caused it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cortex.config.live import LiveConfig
from cortex.control.load_backoff import BackoffCause
from cortex.control.load_failure import LoadFailure, cause_of, failure_of, is_permanent
from cortex.control.loads.evictor import Evictor, NoLongerNeeded
from cortex.control.loads.group_loads import GroupLoads
from cortex.control.loads.load_phases import EVICTING, LoadPhases
from cortex.control.loads.neurons import NeuronAccess
from cortex.control.loads.served_contexts import ServedContexts
from cortex.fleet.load_leases import LoadedElsewhere, LoadLeases
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import NodeRemoved
from cortex.fleet.store import StateFile
from cortex.fleet.unless_down import unless_down
from cortex.metrics.exporter import Metrics
from cortex.placement.capacity import reports_bookable_memory
from cortex.placement.feasibility import is_feasible_elsewhere
from cortex.placement.load_plan import LoadPlan, load_command
from cortex.routing.replica import LoadPhase, ModelOnNode, ReplicaKey
from shared.protocol import ErrorCode, ModelStatus, ModelView
from shared.tasks import TaskSet, timeout

log = logging.getLogger(__name__)


@dataclass
class LoadJob:
    """A load under way; `started` is Unix time, `phase` its current step. `needed`: it continues without waiting
    requests, for an operator or as a replica. `leased`: not at the same moment as another cortex. `elsewhere`: it ended
    because another cortex loads the model on that node. `phases`: those that have begun."""

    plan: LoadPlan
    why: str
    started: float
    phase: str = "starting"
    needed: bool = False
    leased: bool = True
    elsewhere: str | None = None
    task: asyncio.Task[LoadFailure | None] | None = field(default=None, repr=False)
    loading_since: float | None = None  # monotonic: when the neuron was asked
    phases: LoadPhases = field(default_factory=LoadPhases, repr=False)

    @property
    def model_id(self) -> str:
        return self.plan.model_id

    @property
    def node(self) -> str:
        return self.plan.node

    @property
    def reason(self) -> str:
        return self.plan.reason


class Loader:
    """Owns the loads that this cortex has asked for, and `contexts`: what their engines served."""

    def __init__(
        self,
        *,
        neurons: NeuronAccess,
        evictor: Evictor,
        live: LiveConfig,
        metrics: Metrics,
        state: StateFile,
        leases: LoadLeases | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `leases` other cortexes are not asked."""
        self._neurons = neurons
        self._fleet = neurons.fleet
        self._evictor = evictor
        self._live = live
        self._metrics = metrics
        self._state = state
        self.contexts = ServedContexts(neurons.fleet)
        self._leases = leases
        self._clock = clock
        self._groups = GroupLoads(neurons, live)
        self._tasks = TaskSet()
        self._jobs: dict[ReplicaKey, LoadJob] = {}
        self._last_phases: dict[ModelOnNode, tuple[LoadPhase, ...]] = {}

    @property
    def timeout_secs(self) -> float:
        """How long a cold load may take."""
        return self._live.config.cold_load.timeout_secs

    @property
    def load_secs(self) -> Mapping[str, Mapping[str, float]]:
        """Seconds that the last load took, by model and node."""
        return self._state.load_secs

    def phases(self, model_id: str, node: str, *, since: float) -> tuple[LoadPhase, ...]:
        """Of our last load of a model on a node, which may not have ended quite yet; empty without any, and if it ended
        before `since`."""
        running = (job for job in self._jobs.values() if (job.model_id, job.node) == (model_id, node))
        job = next(running, None)
        phases = self._last_phases.get((model_id, node), ()) if job is None else job.phases.ended()
        return phases if phases and phases[-1].until >= since else ()

    def jobs(self) -> list[LoadJob]:
        return list(self._jobs.values())

    def job(self, name: str) -> LoadJob | None:
        """The load of this model, or of the variant of `id@variant`, that is under way, if any."""
        requested = self._live.catalogue.requested(name)
        return next(
            (job for job in self._jobs.values() if requested in (job.plan.requested, (job.model_id, None))), None
        )

    def start(
        self,
        plan: LoadPlan,
        why: str,
        *,
        still_needed: Callable[[], bool],
        done: Callable[[LoadJob, LoadFailure | None], None],
        leased: bool = True,
    ) -> LoadJob:
        """Starts to carry out a plan, or joins the load in progress there. Its reservation and evictions are in the
        fleet's snapshot when this returns: the next decision may be made before the task has started. `still_needed` is
        asked before each eviction; `done` is called at the end, with the failure if there was one."""
        key = plan.key
        if key in self._jobs:
            return self._jobs[key]
        job = self._jobs[key] = LoadJob(plan, why, time.time(), leased=leased, phases=LoadPhases(self._clock))
        lease = self._lease(job)
        for reservation in plan.reservations:
            self._fleet.reserve(reservation)
        for each in plan.eviction_plan.evictions:
            self._fleet.begin_eviction(each.resident.key)
        run = self._run(job, lease, still_needed, done)
        job.task = self._tasks.spawn(run, name=f"load {plan.model_id} on {plan.node}")
        return job

    def _lease(self, job: LoadJob) -> contextlib.AbstractAsyncContextManager[None]:
        """For a plan of this moment: another cortex may load the model before the job's task starts."""
        if self._leases is None or not job.leased:
            return contextlib.nullcontext()
        return self._leases.held(job.model_id, job.node, self._fleet.snapshot())

    async def close(self) -> None:
        """Drops the loads; the neurons continue them."""
        await self._tasks.close()
        await self.contexts.close()

    async def _run(
        self,
        job: LoadJob,
        lease: contextlib.AbstractAsyncContextManager[None],
        still_needed: Callable[[], bool],
        done: Callable[[LoadJob, LoadFailure | None], None],
    ) -> LoadFailure | None:
        failure: LoadFailure | None = None
        try:
            async with lease:
                await self._carry_out(job, still_needed)
            nodes = self._fleet.snapshot().nodes
            known = {place: phases for place, phases in self._last_phases.items() if place[1] in nodes}
            self._last_phases = {**known, (job.model_id, job.node): job.phases.ended()}
        except LoadedElsewhere as found:
            job.elsewhere = found.node
            log.info("not loading %s on %s: another cortex loads it on %s", job.model_id, job.node, found.node)
        except NoLongerNeeded:
            log.info("not loading %s on %s: no request waits for it any more", job.model_id, job.node)
        except (NodeRemoved, CommandAbandoned):
            log.info("%s was removed from the configuration; it completes the load of %s", job.node, job.model_id)
        except LoadFailure as error:
            failure = error
            log.warning("%s", failure)
        except (NeuronRefused, NeuronUnreachable) as error:
            reason = f"evicting models for {job.model_id!r} on {job.node} failed: {error}"
            failure = LoadFailure(reason, BackoffCause.TEMPORARY)
            log.warning("%s", failure)
        except Exception as error:  # waiting requests must learn of any failure
            failure = LoadFailure(f"loading {job.model_id!r} on {job.node} failed: {error!r}", BackoffCause.NODE)
            log.exception("bug while loading %s on %s", job.model_id, job.node)
        finally:
            for each in job.plan.eviction_plan.evictions:
                self._fleet.end_eviction(each.resident.key)
            for reservation in job.plan.reservations:
                self._fleet.release(reservation)
            del self._jobs[job.plan.key]
        if failure is not None:
            self._metrics.load_failed(job.model_id, failure.node or job.node)
        done(job, failure)
        return failure

    async def _carry_out(self, job: LoadJob, still_needed: Callable[[], bool]) -> None:
        plan = job.plan
        log.info(
            "loading %s on %s, devices %s (%s); %s",
            plan.model_id,
            plan.key.name,
            list(plan.gpus) or "none",
            job.why,
            plan.reason,
        )
        evicting = {each.resident.key: each.resident.asleep for each in job.plan.eviction_plan.evictions}
        if evicting:
            job.phases.begin(EVICTING)
            job.phase = f"evicting {', '.join(key.model_id for key in evicting)} before loading"
        async with self._evictor.evicting(evicting, still_needed):
            job.phase = "loading"
            job.phases.begin("starting")
            async with job.phases.following(self._fleet, plan.key):
                await (self._load_parts(job) if plan.parts else self._load(job))

    async def _load_parts(self, job: LoadJob) -> None:
        """Loads an engine that spans several neurons."""
        plan = job.plan
        job.loading_since = started = self._clock()
        profile = self._live.catalogue.profile(plan.requested.name)
        if profile is None:
            raise LoadFailure(f"{plan.model_id!r} left the catalogue", BackoffCause.TEMPORARY)
        await self._groups.load(plan, profile, self.until_loaded)
        took = self._clock() - started
        self._state.set_load_secs(plan.requested.name, plan.node, took)
        self._metrics.cold_start(plan.model_id, plan.node, took, job.phases.ended())
        log.info("loaded %s on %s in %.1f s", plan.model_id, ", ".join(plan.nodes), took)

    async def _load(self, job: LoadJob) -> None:
        plan, started = job.plan, self._clock()
        job.loading_since = started_at = started
        node, client = self._neurons.node(plan.node), self._neurons.client(plan.node)
        fleet, profile = self._fleet, self._live.catalogue.profile(plan.model_id)
        choice = self._live.catalogue.profile(plan.requested.name)
        command = load_command(plan, choice, node, self._live.catalogue.loras(plan.model_id))
        before = node.view(plan.model_id, plan.instance)
        asleep = before is not None and before.known_status is ModelStatus.SLEEPING
        # A waking model is listed as sleeping until it serves, and also if it fails: only the reply says which.
        wait = (asleep and plan.wakes) or not self._neurons.has_extensions(plan.node)
        try:
            if asleep and not plan.wakes:  # it would wake where it sleeps
                unload = client.unload(plan.model_id, plan.instance, timeout_secs=self.timeout_secs)
                await unless_down(fleet, plan.node, unload)
            load = client.load(command, timeout_secs=self.timeout_secs, wait=wait)
            # A neuron may be too busy with the load to answer polls: wait for it unless there is another.
            reply = await unless_down(
                fleet, plan.node, load, give_up=lambda: is_feasible_elsewhere(profile, fleet.snapshot(), plan.node)
            )
        except NeuronRefused as refused:
            if refused.code != ErrorCode.LOAD_IN_PROGRESS:
                await self._neurons.refresh(plan.node)  # our view of it is out of date
                raise failure_of(plan, refused) from refused
            # Another caller's load, started a moment ago: wait for it.
            self._count_as_loading(plan)
            return
        except NeuronUnreachable as error:
            reason = f"loading {plan.model_id!r} on {plan.node} failed: {error}"
            raise LoadFailure(reason, BackoffCause.TEMPORARY) from error
        if reply.status == ModelStatus.LOADING:
            if self._neurons.node(plan.node).view(plan.model_id, plan.instance) is before:
                self._count_as_loading(plan)  # its event has not arrived yet, so our view predates the load
            await self._neurons.refresh(plan.node)
            started_at = await self.until_loaded(plan.key) or started
        took = self._clock() - started
        # Without the wait for another engine's last requests: the next exchange need not be as slow.
        self._state.set_load_secs(plan.requested.name, plan.node, self._clock() - started_at)
        self._fleet.loaded(
            plan.key,
            harness=command.harness,
            devices=plan.gpus,
            variant=plan.variant,
            endpoint=reply.endpoint,
        )
        if choice is not None and not plan.wakes:
            self.contexts.loaded(plan.key, choice)
        self._metrics.cold_start(plan.model_id, plan.node, took, job.phases.ended())
        log.info("loaded %s on %s in %.1f s", plan.model_id, plan.key.name, took)
        if not reports_bookable_memory(self._neurons.node(plan.node)):
            # Its last figures are from before the load: until there are new ones the memory stays reserved, or the next
            # model would seem to fit. Requests for this one do not wait for that.
            await self._neurons.refresh(plan.node)

    def _count_as_loading(self, plan: LoadPlan) -> None:
        status, devices = ModelStatus.LOADING.value, list(plan.gpus)
        instance = plan.instance or None
        view = ModelView(id=plan.model_id, instance=instance, variant=plan.variant, status=status, devices=devices)
        self._fleet.update_model(plan.node, view)

    async def until_loaded(self, key: ReplicaKey) -> float | None:
        """Waits until a load of this engine has ended, first until an engine that still stops under this name has.
        Returns when its engine was seen to start; None if it was not.

        Raises:
            LoadFailure: it failed, or takes longer than `timeout_secs`. NodeRemoved: not known how it ends.
        """

        model_id, name, instance = key

        def settled(node: NodeSnapshot) -> bool:
            view = node.view(model_id, instance)
            return view is None or not (node.healthy and (view.coming or view.ending))

        def starts(node: NodeSnapshot) -> bool:
            view = node.view(model_id, instance)
            return view is None or settled(node) or not (view.ending or view.state in (None, "starting"))

        what = f"loading {model_id!r} on {name} failed"
        try:
            async with timeout(self.timeout_secs):
                started_at = None if settled(await self._fleet.until(name, starts)) else self._clock()
                node = await self._fleet.until(name, settled)
        except asyncio.TimeoutError:
            raise LoadFailure(f"{what}: timed out after {self.timeout_secs:g} s", BackoffCause.NODE) from None
        view = node.view(model_id, instance)
        if not node.healthy:
            raise LoadFailure(f"{what}: the neuron is down: {node.last_error}", BackoffCause.TEMPORARY)
        if view is None or not view.loaded:
            error = None if view is None else view.error
            if error is None:
                raise LoadFailure(f"{what}: it was unloaded in the meantime", BackoffCause.TEMPORARY)
            raise LoadFailure(f"{what}: {error}", cause_of(view), permanent=is_permanent(view))
        return started_at
