"""Carries out plans: drains and evicts models, then loads the new one. At most one load of a model per node. A load
continues when the request that caused it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cortex.config.live import LiveConfig
from cortex.control.load_backoff import BackoffCause
from cortex.control.load_failure import LoadFailure, cause_of, failure_of, is_permanent
from cortex.fleet.load_leases import LoadedElsewhere, LoadLeases
from cortex.fleet.membership import NeuronCommands, Refreshable
from cortex.fleet.neuron_client import CommandAbandoned, NeuronRefused, NeuronUnreachable
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet, NodeRemoved
from cortex.fleet.store import StateFile
from cortex.fleet.unless_down import unless_down
from cortex.metrics.exporter import Metrics
from cortex.metrics.worker_counts import CountTotals
from cortex.placement.capacity import reports_bookable_memory
from cortex.placement.feasibility import is_feasible_elsewhere
from cortex.placement.load_command import load_command
from cortex.placement.node_plan import LoadPlan
from cortex.routing.replica import ReplicaKey
from shared.protocol import MAX_DRAIN_SECS, ErrorCode, ModelStatus, ModelView
from shared.tasks import TaskSet, cancel_all, first_of, timeout

log = logging.getLogger(__name__)

DRAIN_POLL_SECS = 0.05

EvictionMethod: TypeAlias = Literal["unload", "sleep", "sleep_if_idle"]
"""What happens to an evicted model. `sleep`: it is unloaded if it cannot sleep. `sleep_if_idle`: the same, but it stays
if its neuron will not put it to sleep while other clients use it."""


class NoLongerNeeded(Exception):
    """The load or the eviction is no longer needed, and has not changed anything yet."""


@dataclass
class LoadJob:
    """A load under way; `started` is Unix time, `phase` its current step. `needed`: it continues without waiting
    requests, for an operator or as a replica. `leased`: not at the same moment as another cortex. `elsewhere`: it ended
    because another cortex loads the model on that node."""

    plan: LoadPlan
    why: str
    started: float
    phase: str = "starting"
    needed: bool = False
    leased: bool = True
    elsewhere: str | None = None
    task: asyncio.Task[LoadFailure | None] | None = field(default=None, repr=False)
    loading_since: float | None = None  # monotonic: when the neuron was asked

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
    """Owns the loads that this cortex has asked for."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        live: LiveConfig,
        clients: Mapping[str, NeuronCommands],
        pollers: Mapping[str, Refreshable],
        counts: CountTotals,
        metrics: Metrics,
        settle_routes: Callable[[], Awaitable[None]],
        state: StateFile,
        leases: LoadLeases | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`settle_routes` returns when every worker has the current route table. Without `leases` other cortexes are
        not asked."""
        self._fleet = fleet
        self._live = live
        self._clients = clients
        self._pollers = pollers
        self._counts = counts
        self._metrics = metrics
        self._settle_routes = settle_routes
        self._state = state
        self._leases = leases
        self._clock = clock
        self._tasks = TaskSet()
        self._jobs: dict[ReplicaKey, LoadJob] = {}

    @property
    def timeout_secs(self) -> float:
        """How long a cold load may take."""
        return self._live.config.cold_load.timeout_secs

    @property
    def load_secs(self) -> Mapping[str, Mapping[str, float]]:
        """Seconds that the last load took, by model and node."""
        return self._state.load_secs

    def jobs(self) -> list[LoadJob]:
        return list(self._jobs.values())

    def job(self, model_id: str) -> LoadJob | None:
        """The load of this model that is under way, if any."""
        return next((job for job in self._jobs.values() if job.model_id == model_id), None)

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
        key = plan.model_id, plan.node
        if key in self._jobs:
            return self._jobs[key]
        job = self._jobs[key] = LoadJob(plan, why, time.time(), leased=leased)
        self._fleet.reserve(plan.reservation)
        for each in plan.eviction_plan.evictions:
            self._fleet.begin_eviction(each.resident.key)
        job.task = self._tasks.spawn(self._run(job, still_needed, done), name=f"load {plan.model_id} on {plan.node}")
        return job

    async def close(self) -> None:
        """Drops the loads; the neurons continue them."""
        await self._tasks.close()

    async def evict(
        self,
        key: ReplicaKey,
        *,
        method: EvictionMethod,
        still_needed: Callable[[], bool] = lambda: True,
        patient: Callable[[], bool] = lambda: True,
    ) -> None:
        """Drains a model on a node, as long as `patient`, and unloads it or puts it to sleep. Only the scheduler and
        its loads call this. The caller marks the model as `evicting` before and clears that afterwards.

        Raises:
            NoLongerNeeded: the model stays. NeuronRefused, NeuronUnreachable: the neuron did not evict it. NodeRemoved,
            CommandAbandoned: not known whether it is gone.
        """
        model_id, node = key
        await self._settle_routes()
        while self._counts.in_flight(model_id, node) and patient():
            if not still_needed():
                raise NoLongerNeeded
            snapshot = self._node(node)
            if not snapshot.healthy:  # its requests may hang indefinitely, and nothing can be loaded there
                raise NeuronUnreachable(f"{node} is down: {snapshot.last_error}")
            await asyncio.sleep(DRAIN_POLL_SECS)
        if not still_needed():
            raise NoLongerNeeded
        if method != "unload" and await self._put_to_sleep(key, if_idle=method == "sleep_if_idle"):
            return
        drain = min(self.timeout_secs, MAX_DRAIN_SECS) if self._has_extensions(node) and patient() else 0
        await self._unload(key, drain_secs=drain)

    async def _unload(self, key: ReplicaKey, *, drain_secs: float) -> None:
        model_id, node = key
        try:
            unload = self._client(node).unload(model_id, timeout_secs=self.timeout_secs, drain_secs=drain_secs)
            await unless_down(self._fleet, node, unload)
        except NeuronRefused as refused:
            if refused.status != 404:  # already gone
                raise
        finally:
            await self._refresh(node)

    async def _put_to_sleep(self, key: ReplicaKey, *, if_idle: bool) -> bool:
        """False if the model cannot sleep there. Raises NoLongerNeeded as `evict`."""
        model_id, node = key
        try:
            await unless_down(self._fleet, node, self._client(node).sleep(model_id, timeout_secs=self.timeout_secs))
        except NeuronRefused as refused:
            if if_idle and refused.code == ErrorCode.MODEL_BUSY:
                raise NoLongerNeeded from refused
            log.info("unloading %s on %s, because it cannot sleep: %s", model_id, node, refused)
            return False
        finally:
            await self._refresh(node)
        return True

    async def _run(
        self, job: LoadJob, still_needed: Callable[[], bool], done: Callable[[LoadJob, LoadFailure | None], None]
    ) -> LoadFailure | None:
        failure: LoadFailure | None = None
        try:
            leases = self._leases if job.leased else None
            async with contextlib.nullcontext() if leases is None else leases.held(job.model_id, job.node):
                await self._carry_out(job, still_needed)
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
            self._fleet.release(job.plan.reservation)
            del self._jobs[job.model_id, job.node]
        done(job, failure)
        return failure

    async def _carry_out(self, job: LoadJob, still_needed: Callable[[], bool]) -> None:
        plan = job.plan
        log.info(
            "loading %s on %s, devices %s (%s); %s", plan.model_id, plan.node, list(plan.devices), job.why, plan.reason
        )
        evicting = {each.resident.key: each.resident.asleep for each in job.plan.eviction_plan.evictions}
        if evicting:
            job.phase = f"evicting {', '.join(key[0] for key in evicting)} before loading"
        async with self._evicting(evicting, still_needed):
            job.phase = "loading"
            await self._load(job)

    @contextlib.asynccontextmanager
    async def _evicting(
        self, evicting: Mapping[ReplicaKey, bool], still_needed: Callable[[], bool]
    ) -> AsyncIterator[None]:
        """Evicts these models, given with whether they sleep now. Inside the body the load can book their memory:
        each model is gone, or its neuron is stopping it and has promised its memory to this load (a later load, for
        example from another cortex, does not get that memory). After the body all evictions have ended. If a neuron
        refuses one, the remaining evictions are skipped.

        Raises, before the body: as `evict`.
        """
        cancelled = False
        evictions = {
            key: asyncio.create_task(
                self._evict_one(
                    key,
                    method="sleep" if self._sleeps_when_idle(key[0]) and not asleep else "unload",
                    still_needed=lambda: not cancelled and still_needed(),
                ),
                name=f"evict {key[0]} from {key[1]}",
            )
            for key, asleep in evicting.items()
        }
        try:
            await asyncio.gather(*(self._until_memory_promised(key, task) for key, task in evictions.items()))
            yield
        except asyncio.CancelledError:
            await cancel_all(list(evictions.values()))
            raise
        finally:
            cancelled = True
            outcomes = await asyncio.gather(*evictions.values(), return_exceptions=True)
        for (model_id, node), outcome in zip(evictions, outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, NoLongerNeeded):
                log.warning("evicting %s from %s failed: %s", model_id, node, outcome)

    async def _evict_one(self, key: ReplicaKey, *, method: EvictionMethod, still_needed: Callable[[], bool]) -> None:
        await self.evict(key, method=method, still_needed=still_needed)
        self._fleet.end_eviction(key)  # it may be loaded again at once if both fit

    async def _until_memory_promised(self, key: ReplicaKey, sending: asyncio.Task[None]) -> None:
        model_id, name = key

        def ending(node: NodeSnapshot) -> bool:
            # A protocol v1 neuron books no memory in advance: the model must be gone.
            return self._has_extensions(name) and node.status_of(model_id) in (None, ModelStatus.UNLOADED)

        await first_of({"sent": asyncio.shield(sending), "promised": self._fleet.until(name, ending)})

    async def _load(self, job: LoadJob) -> None:
        plan, started = job.plan, self._clock()
        job.loading_since = started_at = started
        node, client = self._node(plan.node), self._client(plan.node)
        fleet, profile = self._fleet, self._live.catalogue.profile(plan.model_id)
        command = load_command(plan, self._live.catalogue.profile(plan.requested.name), node)
        asleep = node.status_of(plan.model_id) is ModelStatus.SLEEPING
        # A waking model is listed as sleeping until it serves, and also if it fails: only the reply says which.
        wait = (asleep and plan.wakes) or not self._has_extensions(plan.node)
        try:
            if asleep and not plan.wakes:  # it would wake where it sleeps
                await unless_down(fleet, plan.node, client.unload(plan.model_id, timeout_secs=self.timeout_secs))
            load = client.load(command, timeout_secs=self.timeout_secs, wait=wait)
            # A neuron may be too busy with the load to answer polls: wait for it unless there is another.
            reply = await unless_down(
                fleet, plan.node, load, give_up=lambda: is_feasible_elsewhere(profile, fleet.snapshot(), plan.node)
            )
        except NeuronRefused as refused:
            if refused.code != ErrorCode.LOAD_IN_PROGRESS:
                await self._refresh(plan.node)  # our view of it is out of date
                raise failure_of(plan, refused) from refused
            # Another caller's load, started a moment ago: wait for it.
            self._count_as_loading(plan)
            return
        except NeuronUnreachable as error:
            reason = f"loading {plan.model_id!r} on {plan.node} failed: {error}"
            raise LoadFailure(reason, BackoffCause.TEMPORARY) from error
        if reply.status == ModelStatus.LOADING:
            if self._node(plan.node).models.get(plan.model_id) is node.models.get(plan.model_id):
                self._count_as_loading(plan)  # its event has not arrived yet, so our view predates the load
            await self._refresh(plan.node)
            started_at = await self.until_loaded(plan.model_id, plan.node) or started
        took = self._clock() - started
        # Without the wait for another engine's last requests: the next exchange need not be as slow.
        self._state.set_load_secs(plan.requested.name, plan.node, self._clock() - started_at)
        self._fleet.loaded(
            plan.node, plan.model_id, harness=command.harness, devices=plan.devices, endpoint=reply.endpoint
        )
        self._metrics.cold_start(plan.model_id, plan.node, took)
        log.info("loaded %s on %s in %.1f s", plan.model_id, plan.node, took)
        if not reports_bookable_memory(self._node(plan.node)):
            # Its last figures are from before the load: until there are new ones the memory stays reserved, or the next
            # model would seem to fit. Requests for this one do not wait for that.
            await self._refresh(plan.node)

    def _count_as_loading(self, plan: LoadPlan) -> None:
        view = ModelView(id=plan.model_id, status=ModelStatus.LOADING.value, devices=list(plan.devices))
        self._fleet.update_model(plan.node, view)

    async def until_loaded(self, model_id: str, name: str) -> float | None:
        """Waits until a load on this node has ended. Returns when its engine was seen to start; None if it was not.

        Raises:
            LoadFailure: it failed, or takes longer than `timeout_secs`. NodeRemoved: not known how it ends.
        """

        def settled(node: NodeSnapshot) -> bool:
            return not (node.healthy and node.is_loading(model_id))

        def starts(node: NodeSnapshot) -> bool:
            return settled(node) or node.models[model_id].state not in (None, "starting")

        what = f"loading {model_id!r} on {name} failed"
        try:
            async with timeout(self.timeout_secs):
                started_at = None if settled(await self._fleet.until(name, starts)) else self._clock()
                node = await self._fleet.until(name, settled)
        except asyncio.TimeoutError:
            raise LoadFailure(f"{what}: timed out after {self.timeout_secs:g} s", BackoffCause.NODE) from None
        view = node.models.get(model_id)
        if not node.healthy:
            raise LoadFailure(f"{what}: the neuron is down: {node.last_error}", BackoffCause.TEMPORARY)
        if view is None or view.known_status is not ModelStatus.LOADED:
            error = None if view is None else view.error
            if error is None:
                raise LoadFailure(f"{what}: it was unloaded in the meantime", BackoffCause.TEMPORARY)
            raise LoadFailure(f"{what}: {error}", cause_of(view), permanent=is_permanent(view))
        return started_at

    def _node(self, name: str) -> NodeSnapshot:
        if (node := self._fleet.snapshot().nodes.get(name)) is None:
            raise NodeRemoved(name)
        return node

    def _client(self, name: str) -> NeuronCommands:
        if (client := self._clients.get(name)) is None:
            raise NodeRemoved(name)
        return client

    async def _refresh(self, name: str) -> None:
        if (poller := self._pollers.get(name)) is not None:
            await poller.refresh()

    def _sleeps_when_idle(self, model_id: str) -> bool:
        profile = self._live.catalogue.profile(model_id)
        return profile is not None and profile.when_idle == "sleep"

    def _has_extensions(self, node: str) -> bool:
        """False for a protocol v1 neuron: it has no instance id and supports only the six basic requests."""
        return self._node(node).instance is not None
