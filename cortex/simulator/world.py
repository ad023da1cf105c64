"""The fleet in virtual time: requests come, wait, are served; what a policy decides is carried out as cortex does it.

Stands for cortex/control/scheduler.py and loader.py, with their rules: one load of a model at a time; who makes way
gets nothing new, finishes what it works on, and is unloaded; then the newcomer is loaded, and all that wait for it are
served. Polls take no time, no load fails, no node dies.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cortex.control.backoff import Backoffs, Cause
from cortex.control.demand import SAMPLE_SECS, Demand
from cortex.control.scheduler import LOOK_AGAIN_SECS
from cortex.fleet.snapshot import FleetSnapshot
from cortex.metrics.in_flight import Key
from cortex.placement.fair_queue import Turn
from cortex.placement.inputs import View, Waiting
from cortex.placement.planner import Plan
from cortex.placement.replicas import Retirement, is_kept_up
from cortex.simulator.clock import Clock
from cortex.simulator.engine import Engine, Request
from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.host import Host, NoRoom
from cortex.simulator.outcome import CountTotals, MemoryUse, Outcome, figures
from cortex.simulator.policies import Policy
from cortex.simulator.sent import Sent
from cortex.simulator.trace import Ask
from shared.protocol import ModelStatus

RECENT_SECS = 60.0
"""A model that was used less than so long ago counts as hot when it is displaced."""
TINY_SECS = 1e-6
"""So much later a moment is looked at than it was computed to be, for what rounding does to sums."""


@dataclass
class _Room:
    since: float
    requests: list[Request] = field(default_factory=list)


@dataclass
class _Job:
    """A load under way: `plan` with the models that have still to go."""

    plan: Plan
    for_waiters: bool
    staying: set[Key]  # that are not gone yet


class World:
    """Owner of everything that changes in one simulation."""

    def __init__(self, fleet: SimulatedFleet, trace: Sequence[Ask], policy: Policy) -> None:
        self.clock = Clock()
        self.hosts = {node.name: Host(node) for node in fleet.file.nodes}
        self.requests = [Request(number, ask.model, ask.at, ask.secs) for number, ask in enumerate(trace)]
        self.counts = CountTotals()
        self._fleet = fleet
        self._policy = policy
        self._sent = Sent()
        self._demand = Demand(self._sent.counts(), clock=self.clock)
        self._bars = Backoffs(self.clock)
        self._jobs: dict[Key, _Job] = {}
        self._leaving: set[Key] = set()
        self._retiring: dict[Key, Retirement] = {}
        self._stopping: set[Key] = set()
        self._rooms: dict[str, _Room] = {}
        self._load_secs: dict[str, dict[str, float]] = {}
        self._kept_up = [profile for profile in fleet.catalogue.models if is_kept_up(profile)]
        self._turn = Turn()
        self._next_look = math.inf
        self._looked_at = -math.inf
        self._appointments: Counter[Key] = Counter()  # the last one made for an engine's next end
        self.ends = 0  # requests that have ended
        self._ended_at = 0.0
        self._memory_shares = 0.0, 0.0
        self._memory = MemoryUse(sum(gpu.vram_total_mb for node in fleet.file.nodes for gpu in node.gpus))

    def start(self) -> None:
        """From now on, the clock's steps bring the requests and what follows from them, until the last has ended."""
        if self.requests:
            self.clock.at(self.requests[0].at, lambda: self._arrive(0))
            self.clock.at(SAMPLE_SECS, self._sample)

    def outcome(self) -> Outcome:
        """The figures, when nothing happens any more."""
        by_model: defaultdict[str, list[Request]] = defaultdict(list)
        for request in self.requests:
            by_model[request.model].append(request)
        loaded, in_use = self._memory_shares
        return Outcome(
            policy=self._policy.name,
            total=figures(self.requests, self.counts, [profile.id for profile in self._fleet.catalogue.models]),
            by_model={model: figures(by_model[model], self.counts, [model]) for model in sorted(by_model)},
            secs=self._ended_at,
            vram_loaded_pct=loaded,
            vram_in_use_pct=in_use,
        )

    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(
            {name: host.snapshot() for name, host in self.hosts.items()},
            tuple(job.plan.reservation for job in self._jobs.values()),
            frozenset(self._leaving),
        )

    def view(self) -> View:
        return View(
            now=self.clock.now,
            catalogue=self._fleet.catalogue,
            fleet=self.snapshot(),
            rules=self._fleet.rules,
            uses=self._demand.uses(),
            waiting={model: Waiting(len(room.requests), room.since) for model, room in self._rooms.items()},
            demand=self._demand.per_minute(),
            load_secs=self._load_secs,
            bars=self._bars.current(),
            pressed=self._demand.pressed,
        )

    # Requests

    def _arrive(self, number: int) -> None:
        request = self.requests[number]
        if number + 1 < len(self.requests):
            self.clock.at(self.requests[number + 1].at, lambda: self._arrive(number + 1))
        if self._serve(request):
            return
        request.cold = True
        self._demand.arrived(request.model)
        room = self._rooms.setdefault(request.model, _Room(self.clock.now))
        room.requests.append(request)
        self.clock.at(self.clock.now + self._fleet.file.serving.timeout_secs, lambda: self._give_up(request))
        if request.model not in self._turn.notes and not self._is_coming(request.model):
            self._look()

    def _serve(self, request: Request) -> bool:
        """False when no engine has the model now."""
        serving = [
            (engine.in_flight, name)
            for name, host in self.hosts.items()
            if (engine := host.engines.get(request.model)) is not None
            and engine.status is ModelStatus.LOADED
            and (request.model, name) not in self._leaving
        ]
        if not serving:
            return False
        key = request.model, min(serving)[1]
        engine = self._engine(key)
        request.begun = self.clock.now
        if not engine.in_flight:
            self._memory.change(self.clock.now, working_mb=engine.booked_mb)
        engine.begin(request, self.clock.now)
        self._sent.requests.add(key)
        self._expect_end(key)
        return True

    def _expect_end(self, key: Key) -> None:
        self._appointments[key] += 1
        number, when = self._appointments[key], self._engine(key).next_end()
        if when is not None:
            self.clock.at(when, lambda: self._end(key, number))

    def _end(self, key: Key, number: int) -> None:
        if self._appointments[key] != number:
            return  # another came meanwhile
        engine = self._engine(key)
        self._finish(engine.end_next(self.clock.now))
        self._sent.requests.remove(key)
        self._expect_end(key)
        if not engine.in_flight:
            self._memory.change(self.clock.now, working_mb=-engine.booked_mb)
            if key in self._leaving:
                self._drained(key)
            elif self._turn.notes:
                self._look_at(self._looked_at + LOOK_AGAIN_SECS)

    def _give_up(self, request: Request) -> None:
        if request.begun is None and request.ended is None:
            room = self._rooms[request.model]
            room.requests.remove(request)
            if not room.requests:
                del self._rooms[request.model]
            self._finish(request)

    def _finish(self, request: Request) -> None:
        request.ended = self.clock.now
        self.ends += 1
        if self.ends == len(self.requests):
            self._ended_at, self._memory_shares = self.clock.now, self._memory.shares(self.clock.now)

    # Decisions

    def _look(self) -> None:
        """As `Scheduler.look`."""
        self._looked_at, self._next_look = self.clock.now, math.inf
        if all(self._is_coming(model) for model in self._rooms):
            self._turn = Turn()
            return
        view = self.view()
        self._turn = turn = self._policy.turn(view)
        for plan in turn.loads:
            self._begin(plan, for_waiters=True)
        for model in turn.refused:
            for request in self._rooms.pop(model).requests:
                self._finish(request)
        if turn.notes:
            self._look_at(min(self._moments(view), default=math.inf))

    def _look_at(self, when: float) -> None:
        """At that moment, unless there is a look before."""
        if when < self._next_look:
            self._next_look = when = max(when, self.clock.now)
            self.clock.at(when, lambda: self._look() if self._next_look == when else None)

    def _moments(self, view: View) -> Iterator[float]:
        """When the passing of time alone may change a decision: cortex looks every quarter of a second instead."""
        rules = view.rules
        moments = [] if self._turn.wake_at is None else [self._turn.wake_at]
        for waiting in view.waiting.values():
            moments += [waiting.since + rules.patience_secs, waiting.since + rules.starvation_secs]
        moments += [bar.until for bar in view.bars.values()]
        for (model, _), use in view.uses.items():
            profile = view.catalogue.profile(model)
            own = None if profile is None else profile.min_residency_secs
            moments.append(use.loaded_at + (rules.min_residency_secs if own is None else own))
            moments.append(max(use.last_used, use.loaded_at) + rules.pause_secs)
        return (moment + TINY_SECS for moment in moments if moment > view.now)

    def _sample(self) -> None:
        """As `Scheduler.keep_up`."""
        if self.ends == len(self.requests):
            return
        self.clock.at(self.clock.now + SAMPLE_SECS, self._sample)
        self._demand.sample(self.snapshot(), replica_target=self._fleet.rules.replica_target)
        if self._kept_up:
            steps = self._policy.upkeep(self.view(), self._kept_up)
            for plan, _ in steps.loads:
                self._begin(plan, for_waiters=False)
            for retirement in steps.retirements:
                self._retire(retirement)

    # Loads, as `Loader` carries them out

    def _begin(self, plan: Plan, *, for_waiters: bool) -> None:
        key = plan.model_id, plan.node
        if key in self._jobs:
            return
        leaving = [each.resident.key for each in plan.displacement.evictions]
        self._jobs[key] = job = _Job(plan, for_waiters, set(leaving))
        uses = self._demand.uses()
        self._leaving.update(leaving)
        for gone in leaving:
            self.counts.displacements[gone[0]] += 1
            if self._engine(gone).in_flight or self.clock.now - uses[gone].last_used < RECENT_SECS:
                self.counts.hot_displacements[gone[0]] += 1
        for gone in leaving:
            if not self._engine(gone).in_flight:
                self._drained(gone)
        if not leaving:
            self._load(job)

    def _drained(self, key: Key) -> None:
        """A model that is to leave has nothing to do any more."""
        if key in self._stopping:
            return
        job = self._job_displacing(key)
        retirement = self._retiring.get(key)
        if (job is not None and job.for_waiters and job.plan.model_id not in self._rooms) or (
            job is None and retirement is not None and retirement.model_id in self._rooms
        ):
            self._call_off(key, job)
            return
        self._stopping.add(key)
        self.clock.at(self.clock.now + self._fleet.file.load_secs.unload, lambda: self._gone(key))

    def _call_off(self, key: Key, job: _Job | None) -> None:
        """Nobody waits any more for what it would have made way for, or somebody waits for it: it stays."""
        if job is None:
            del self._retiring[key]
            self._leaving.discard(key)
        else:
            del self._jobs[job.plan.model_id, job.plan.node]
            self._leaving -= {each.resident.key for each in job.plan.displacement.evictions} - self._stopping
        self._news(key[0])

    def _gone(self, key: Key) -> None:
        self._stopping.discard(key)
        engine = self._engine(key)
        self._memory.change(self.clock.now, held_mb=-engine.booked_mb)
        self.hosts[key[1]].remove(key[0], self.clock.now)
        self._leaving.discard(key)
        self._retiring.pop(key, None)
        self._demand.routes_changed([key[0]], self.snapshot())
        job = self._job_displacing(key)
        if job is not None:
            job.staying.discard(key)
            if not job.staying:
                self._load(job)
        self._look_at(self.clock.now)

    def _load(self, job: _Job) -> None:
        plan, now = job.plan, self.clock.now
        engine = Engine(plan.model_id, plan.devices, plan.share_mb, self._fleet.parallel(plan.model_id))
        host = self.hosts[plan.node]
        try:
            host.add(engine, now)
        except NoRoom as error:
            self._bars.failed(plan.model_id, plan.node, Cause.NODE, str(error))
            self._close(job)
            return
        self.counts.loads[plan.model_id] += 1
        self._memory.change(now, held_mb=engine.booked_mb)
        secs = self._fleet.load_secs(plan.model_id, host.node)
        self.clock.at(now + secs, lambda: self._loaded(job, secs))

    def _loaded(self, job: _Job, secs: float) -> None:
        plan, now = job.plan, self.clock.now
        engine = self._engine((plan.model_id, plan.node))
        engine.status = ModelStatus.LOADED
        self.hosts[plan.node].changed(engine, now)
        self._load_secs.setdefault(plan.model_id, {})[plan.node] = secs
        self._demand.routes_changed([plan.model_id], self.snapshot())
        self._bars.succeeded(plan.model_id, plan.node)
        self._close(job)

    def _close(self, job: _Job) -> None:
        del self._jobs[job.plan.model_id, job.plan.node]
        self._leaving -= {each.resident.key for each in job.plan.displacement.evictions}
        self._news(job.plan.model_id)

    def _retire(self, retirement: Retirement) -> None:
        key = retirement.model_id, retirement.node
        if key not in self._retiring and key not in self._leaving:
            self._retiring[key] = retirement
            self._leaving.add(key)
            if not self._engine(key).in_flight:
                self._drained(key)

    def _news(self, model: str) -> None:
        """The model may be served now: who waits for it is, and the others' places are looked for again."""
        room = self._rooms.get(model)
        if room is not None:
            room.requests = [request for request in room.requests if not self._serve(request)]
            if not room.requests:
                del self._rooms[model]
        self._look_at(self.clock.now)

    def _job_displacing(self, key: Key) -> _Job | None:
        return next((job for job in self._jobs.values() if key in job.staying), None)

    def _is_coming(self, model: str) -> bool:
        return any(job.plan.model_id == model for job in self._jobs.values())

    def _engine(self, key: Key) -> Engine:
        return self.hosts[key[1]].engines[key[0]]


def simulate(fleet: SimulatedFleet, trace: Sequence[Ask], policy: Policy) -> Outcome:
    """One policy over one trace."""
    world = World(fleet, trace, policy)
    world.start()
    while world.clock.step():
        pass
    return world.outcome()
