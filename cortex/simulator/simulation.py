"""One simulation: the control of `cortex serve` on virtual time, with simulated neurons and the requests of a
trace."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.config.live import LiveConfig
from cortex.config.profile import ModelProfile
from cortex.config.settings import ColdLoadSettings, CortexConfig, WaitingSettings
from cortex.control.scheduler import Policy
from cortex.control.wiring import build
from cortex.fleet.groups import serving_engine
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.metrics.counters import Counters
from cortex.metrics.in_flight import CallerAt, CallerCount, InFlight
from cortex.placement.fair_queue import LoadSchedule
from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import LoadPlan
from cortex.placement.replicas import ReplicaChanges
from cortex.routing.replica import Replica, ReplicaKey, adapter_key
from cortex.simulator.engine import SimulatedEngine, SimulatedRequest
from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.neuron import GroupStarts, SimulatedNeuron
from cortex.simulator.outcome import EventCounts, MemoryUse, Outcome, figures, waiting
from cortex.simulator.policies import POLICIES
from cortex.simulator.trace import Ask
from cortex.simulator.virtual_time import VirtualTimeLoop, rounded_up, run_in_virtual_time
from shared.errors import ServiceError
from shared.protocol import ErrorCode
from shared.tasks import TaskSet, first_of

REPORT_SECS = 2.0
"""How often cortex asks a neuron, by default."""
RECENT_SECS = 60.0
"""Evicting a model used within this time counts as a hot eviction."""
SETTLE_SECS = 0.5
"""After a rule's time is up, the policy decides at every check for this long: rounding may hide it from the first
check."""


class SimulatedWorker:
    """The only worker: counts the requests that were sent to engines. Satisfies `WorkerCounts`."""

    def __init__(self) -> None:
        self.requests = InFlight()

    def collect(self, *, callers: bool = False) -> Counters:
        return Counters()

    def in_flight_here(self) -> Mapping[ReplicaKey, int]:
        return self.requests.here

    def begun_here(self) -> Mapping[ReplicaKey, int]:
        return self.requests.begun

    def take_callers(self) -> Mapping[CallerAt, CallerCount]:
        return self.requests.take_callers()

    async def refresh(self, *, callers: bool = False) -> None:
        """Nothing to do: the counts are live."""


class ObservedPolicy:
    """Counts a policy's evictions, and repeats its last schedule while its inputs are unchanged.

    The scheduler decides every quarter of a second while a model waits for memory; most of the time nothing changed.
    """

    def __init__(self, policy: Policy, counts: EventCounts) -> None:
        self._policy = policy
        self._counts = counts
        self._fleet: FleetSnapshot | None = None  # the same object while nothing changes
        self._state: object = None
        self._schedule = LoadSchedule()
        self._valid_until = -math.inf

    def as_policy(self) -> Policy:
        return Policy(self._schedule_loads, self._reconcile_replicas)

    def _schedule_loads(self, view: PlanningView) -> LoadSchedule:
        busy = frozenset(key for key, use in view.usages.items() if use.in_flight)
        callers = {key: use.callers for key, use in view.usages.items() if use.callers}
        state = view.waiting, busy, view.backoffs, view.accounts, callers
        if view.fleet is not self._fleet or state != self._state or view.now >= self._valid_until:
            self._schedule = self._policy.schedule_loads(view)
            self._fleet, self._state = view.fleet, state
            self._valid_until = min(_moments(view, self._schedule), default=math.inf)
            self._count(view, self._schedule.loads)
        return self._schedule

    def _reconcile_replicas(self, view: PlanningView, profiles: Iterable[ModelProfile]) -> ReplicaChanges:
        steps = self._policy.reconcile_replicas(view, profiles)
        self._count(view, [plan for plan, _ in steps.loads])
        return steps

    def _count(self, view: PlanningView, plans: Sequence[LoadPlan]) -> None:
        for plan in plans:
            evicted = (view.fleet.engine(each.resident.key) for each in plan.eviction_plan.evictions)
            # The parts of a group go together, and count as one.
            for key in {serving_engine(view.fleet, each).key for each in evicted if each is not None}:
                model_id, use = key.model_id, view.usage(key)
                self._counts.evictions[model_id] += 1
                if use.in_flight or view.now - use.last_used < RECENT_SECS:
                    self._counts.hot_evictions[model_id] += 1


def _moments(view: PlanningView, schedule: LoadSchedule) -> Iterator[float]:
    """Times at which the passing of time alone may change a decision."""
    rules = view.rules
    moments = [] if schedule.recheck_at is None else [schedule.recheck_at]
    for requests in view.waiting.values():
        since = view.unserved_since(requests)
        moments += [since + rules.patience_secs, since + rules.starvation_secs]
    moments += [backoff.until for backoff in view.backoffs.values()]
    for key, use in view.usages.items():
        profile = view.catalogue.profile(key.model_id)
        own = None if profile is None else profile.min_residency_secs
        moments.append(use.loaded_at + (rules.min_residency_secs if own is None else own))
        moments.append(max(use.last_used, use.loaded_at) + rules.pause_secs)
    return (moment for moment in moments if moment > view.now - SETTLE_SECS)


class Simulation:
    """Owns the parts of a simulated cortex. Create and run it on a `VirtualTimeLoop`."""

    def __init__(
        self, simulated: SimulatedFleet, trace: Sequence[Ask], policy: Policy, name: str, *, fair: bool = True
    ) -> None:
        """`fair`: the control knows the keys. Otherwise it treats all requests as one caller's."""
        self.requests = [
            SimulatedRequest(number, ask.model, rounded_up(ask.at), ask.secs, key=ask.key)
            for number, ask in enumerate(trace)
        ]
        self._fair = fair
        self._several_callers = fair and len({request.key for request in self.requests}) > 1
        self._limited: dict[int, Replica] = {}  # by number of the request
        self.counts = EventCounts()
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._catalogue = simulated.catalogue
        file, clock = simulated.file, self._loop.time
        live = LiveConfig(
            CortexConfig(
                placement=file.placement,
                cold_load=ColdLoadSettings(timeout_secs=file.serving.timeout_secs),
                waiting=WaitingSettings(per_model=len(trace) + 1, total=len(trace) + 1),
            ),
            simulated.catalogue,
        )
        self._worker = SimulatedWorker()
        self.fleet = Fleet([(node.name, f"http://{node.name}") for node in file.nodes], unhealthy_after=1, clock=clock)
        self._memory = MemoryUse(sum(node.total_mb for node in file.nodes))
        starts = GroupStarts()
        self.neurons = {
            node.name: SimulatedNeuron(
                node, simulated, self.fleet, starts, self._memory_changed, with_activity=self._several_callers
            )
            for node in file.nodes
        }
        self._core = build(
            live,
            StateFile(),
            self.fleet,
            self.neurons,
            self.neurons,
            clock=clock,
            policy=ObservedPolicy(policy, self.counts).as_policy(),
        )
        self._core.counts.attach(self._worker)
        self._ends: dict[ReplicaKey, asyncio.TimerHandle] = {}
        self._tasks = TaskSet()
        self._unfinished = len(self.requests)
        self._finished: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> Outcome:
        """Plays the trace until its last request has ended."""
        try:
            await first_of(
                {
                    "finished": self._finished,
                    **{name: loop() for name, loop in self._core.loops.items()},
                    "arrivals": self._arrivals(),
                    "reports": self._reports(),
                }
            )
            return self._outcome()
        finally:
            await self._tasks.close()
            await self._core.close()

    def _outcome(self) -> Outcome:
        by_model: defaultdict[str, list[SimulatedRequest]] = defaultdict(list)
        by_key: defaultdict[str, list[float]] = defaultdict(list)
        for request in self.requests:
            by_model[request.model].append(request)
            if request.key:
                by_key[request.key].append(request.waited)
        for neuron in self.neurons.values():
            self.counts.loads.update(neuron.loads)
        loaded, in_use = self._memory.shares(self._loop.time())
        return Outcome(
            policy=self._name,
            total=figures(self.requests, self.counts, [profile.id for profile in self._catalogue.models]),
            by_model={model: figures(by_model[model], self.counts, [model]) for model in sorted(by_model)},
            waiting_by_key={key: waiting(by_key[key]) for key in sorted(by_key)},
            secs=self._loop.time(),
            vram_loaded_pct=loaded,
            vram_in_use_pct=in_use,
        )

    def _memory_changed(self, more_mb: int) -> None:
        self._memory.change(self._loop.time(), held_mb=more_mb)

    async def _reports(self) -> None:
        """Has the neurons report regularly, where it matters what their engines do."""
        while self._several_callers:
            await asyncio.sleep(REPORT_SECS)
            for neuron in self.neurons.values():
                neuron.report()
        await self._finished

    async def _arrivals(self) -> None:
        for request in self.requests:
            await asyncio.sleep(request.at - self._loop.time())
            _ = self._tasks.spawn(self._serve(request), name=f"request {request.number}")
        await self._finished

    async def _serve(self, request: SimulatedRequest) -> None:
        """Sends a request to the engine that the resolver finds for it, as a worker does."""
        try:
            route = await self._core.resolver.resolve(request.model, caller=self._caller(request))
        except ServiceError as error:
            if error.code == ErrorCode.INTERNAL_ERROR:  # a bug must end the simulation
                self._finished.set_exception(error)
            else:
                request.cold = True
                self._finish(request)
            return
        request.cold = route.cold
        if route.replica.limit is not None:
            self._limited[request.number] = route.replica
        self._begin(request, route.replica.key)

    def _begin(self, request: SimulatedRequest, key: ReplicaKey) -> None:
        engine = self._engine(key)
        request.begun = self._loop.time()
        if not engine.in_flight:
            self._memory.change(request.begun, working_mb=engine.working_mb)
        engine.begin(request, request.begun)
        for counted, key_id in self._counted(request, key):
            self._worker.requests.add(counted, key_id)
        self._expect_end(key)

    def _expect_end(self, key: ReplicaKey) -> None:
        """Sets the timer for the engine's next completion; a request that begins sooner moves it."""
        timer = self._ends.pop(key, None)
        if timer is not None:
            timer.cancel()
        when = self._engine(key).next_end()
        if when is not None:
            self._ends[key] = self._loop.call_at(when, self._end, key)

    def _end(self, key: ReplicaKey) -> None:
        engine = self._engine(key)
        request = engine.end_next(self._loop.time())
        for counted, key_id in self._counted(request, key):
            self._worker.requests.remove(counted, key_id)
        limited = self._limited.pop(request.number, None)
        if limited is not None:
            self._core.resolver.release(limited)
        self._expect_end(key)
        if not engine.in_flight:
            self._memory.change(self._loop.time(), working_mb=-engine.working_mb)
        self._finish(request)

    def _finish(self, request: SimulatedRequest) -> None:
        request.ended = self._loop.time()
        self._unfinished -= 1
        if not self._unfinished:
            self._finished.set_result(None)

    def _caller(self, request: SimulatedRequest) -> Caller:
        return Caller(request.key, request.key) if self._fair and request.key else ANONYMOUS

    def _counted(self, request: SimulatedRequest, key: ReplicaKey) -> tuple[tuple[ReplicaKey, str], ...]:
        """What the request counts for: its engine, there also for its API key, and its adapter there."""
        name = self._catalogue.resolve(request.model)
        engine = key, self._caller(request).key_id
        return (engine, (adapter_key(name, key), "")) if name in self._catalogue.adapters else (engine,)

    def _engine(self, key: ReplicaKey) -> SimulatedEngine:
        return self.neurons[key.node].engines[key.model_id, key.instance]


def simulate(
    simulated: SimulatedFleet,
    trace: Sequence[Ask],
    policy: str,
    loop: VirtualTimeLoop | None = None,
    *,
    fair: bool = True,
) -> Outcome:
    """Plays a trace under the named policy; `loop` must be new. `fair` as in `Simulation`."""

    async def play() -> Outcome:
        return await Simulation(simulated, trace, POLICIES[policy], policy, fair=fair).run()

    return run_in_virtual_time(play(), loop)
