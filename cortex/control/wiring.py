"""The parts of a control, built in the order of their dependencies, for `cortex serve` and for the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from cortex.accounts.caller import Caller
from cortex.accounts.fairness.device_time import DeviceTime
from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.limits.limiter import LimitOwner
from cortex.accounts.limits.local_limiter import LocalLimiter
from cortex.accounts.limits.model_terms import ModelTermsTable
from cortex.accounts.limits.opening import open_limiter
from cortex.accounts.sign_in.opening import open_sign_in
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.accounts.storage import Storage
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import Demand
from cortex.control.endpoints import Endpoints
from cortex.control.load_backoff import Backoffs
from cortex.control.loads.adapters import AdapterLoads
from cortex.control.loads.engine_room import EngineRoom
from cortex.control.loads.evictor import Evictor
from cortex.control.loads.groups import GroupKeeper
from cortex.control.loads.loader import Loader
from cortex.control.loads.neurons import NeuronAccess
from cortex.control.resolver import Resolver
from cortex.control.route_table import RouteTable
from cortex.control.scheduler import PLANNER, Policy, Scheduler
from cortex.control.shutdown import Shutdown
from cortex.fleet.load_leases import LoadLeases
from cortex.fleet.members.decisions import Decisions, open_decisions
from cortex.fleet.members.dialled.broker_process import DialBroker, address_of
from cortex.fleet.members.membership import Membership, NeuronCommands, Refreshable
from cortex.fleet.members.opening import open_discovery
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.neuron_client import IDLE_SECS, NeuronClient
from cortex.fleet.poller import NeuronPoller
from cortex.fleet.state import Fleet, RouteChanges
from cortex.fleet.store import StateFile
from cortex.fleet.timeline.spans import Cause
from cortex.fleet.timeline.timeline import ModelCounts, Timeline
from cortex.fleet.timeline.timeline_file import TimelineFile
from cortex.fleet.variant_labels import VariantLabels
from cortex.metrics.counters import merged
from cortex.metrics.energy import energy_books
from cortex.metrics.exporter import Metrics
from cortex.metrics.requests.history import RequestHistory
from cortex.metrics.worker_counts import CountTotals
from cortex.placement.feasibility import inferred_variant
from cortex.upstream.pool import EnginePool
from shared.tasks import running
from shared.tls import RenewedContext, client_context

if TYPE_CHECKING:  # imports SQLAlchemy, which the simulator does not need
    from cortex.accounts.database.database import Database


@dataclass(frozen=True)
class ControlCore:
    """Everything that decides and acts, around a fleet."""

    live: LiveConfig
    state: StateFile
    shutdown: Shutdown
    fleet: Fleet
    counts: CountTotals
    demand: Demand
    metrics: Metrics
    queue: AdmissionQueue
    routes: RouteTable
    loader: Loader
    scheduler: Scheduler
    resolver: Resolver
    groups: GroupKeeper
    adapters: AdapterLoads
    room: EngineRoom

    @property
    def config(self) -> CortexConfig:
        """The configuration in force."""
        return self.live.config

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue in force."""
        return self.live.catalogue

    @property
    def loops(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What has to run all the time, by name."""
        return {
            "scheduler": self.scheduler.run,
            "replica control": self.scheduler.reconcile_loop,
            "groups": self.groups.run,
            "engine room": self.room.run,
            "adapters": self.adapters.spread_loop,
            "route changes": partial(follow_routes, self.fleet, self.routes, self.scheduler, self.queue),
        }

    async def close(self) -> None:
        """Ends its background tasks. The loops must have ended before."""
        owners = (self.loader, self.scheduler, self.routes, self.groups, self.adapters)
        await asyncio.gather(*(owner.close() for owner in owners))


@dataclass(frozen=True)
class Parts(ControlCore):
    """A running control, for `cortex.app` and `cortex.cli.serve`, which give each object what it needs of it. `created`
    is Unix time. `database` is None for a cortex that keeps nothing, `sign_in` if people cannot sign in."""

    membership: Membership
    broker: DialBroker | None
    created: int
    database: Database | None
    keys: KeyRing
    timeline: Timeline
    requests: RequestHistory
    sign_in: SignIn | None
    registrations: Registrations | None
    decisions: Decisions
    storage: Storage

    @property
    def broker_address(self) -> str | None:
        """For pools; see `EnginePool`."""
        return address_of(self.broker)

    @property
    def clients(self) -> Mapping[str, NeuronClient]:
        """By neuron name, the present ones."""
        return self.membership.clients

    @property
    def pollers(self) -> Mapping[str, NeuronPoller]:
        """By neuron name, the present ones."""
        return self.membership.pollers


def build(
    live: LiveConfig,
    state: StateFile,
    fleet: Fleet,
    clients: Mapping[str, NeuronCommands],
    pollers: Mapping[str, Refreshable],
    *,
    clock: Callable[[], float] = time.monotonic,
    policy: Policy = PLANNER,
    leases: LoadLeases | None = None,
    limiter: LimitOwner | None = None,
    caller_of: Callable[[str], Caller | None] = lambda _: None,
) -> ControlCore:
    """Everything that decides and acts, around the fleet. Starts nothing. `clients` and `pollers` are by neuron name.
    `clock`: monotonic seconds. Without `leases` it asks no other cortexes. `caller_of` finds the caller by key id."""
    shutdown, counts, backoffs = Shutdown(), CountTotals(), Backoffs(clock)
    demand = _demand(fleet, counts, clock, _device_time(live, state, caller_of))
    queue = AdmissionQueue(live=live, clock=clock)
    shutdown.beginning.subscribe(queue.notify_all)
    endpoints = Endpoints(fleet=fleet, clients=clients, pollers=pollers, clock=clock)
    endpoints.refusals.subscribe(backoffs.record_refused_endpoint)
    room = EngineRoom(fleet=fleet, counts=counts, queue=queue, demand=demand)
    routes, neurons = _routes(live, fleet, endpoints, counts, room), NeuronAccess(fleet, clients, pollers)
    metrics = _metrics(fleet, counts, queue, demand, state.directory)
    evictor = Evictor(neurons, live=live, counts=counts, settle_routes=routes.settle, displaced=metrics.displaced)
    loader = Loader(
        neurons=neurons, evictor=evictor, live=live, metrics=metrics, state=state, leases=leases, clock=clock
    )
    scheduler = Scheduler(
        live=live,
        fleet=fleet,
        loader=loader,
        evictor=evictor,
        demand=demand,
        backoffs=backoffs,
        queue=queue,
        state=state,
        clock=clock,
        policy=policy,
    )
    adapters = AdapterLoads(neurons, live=live, counts=counts, demand=demand)
    resolver = Resolver(
        live=live,
        fleet=fleet,
        routes=routes,
        scheduler=scheduler,
        queue=queue,
        pollers=pollers,
        counts=counts,
        demand=demand,
        shutdown=shutdown,
        state=state,
        contexts=loader.contexts,
        room=room,
        adapters=adapters,
        limiter=limiter or LocalLimiter(_model_terms(live, fleet)),
        clock=clock,
    )
    work = (loader, scheduler, resolver, GroupKeeper(neurons, clock=clock), adapters, room)
    return ControlCore(live, state, shutdown, fleet, counts, demand, metrics, queue, routes, *work)


def _metrics(
    fleet: Fleet, counts: CountTotals, queue: AdmissionQueue, demand: Demand, state_dir: Path | None
) -> Metrics:
    in_flight, counters = counts.all_in_flight, partial(counts.counters, callers=True)
    return Metrics(
        fleet, in_flight, counters, waiting=queue.counts, charged=lambda: demand.charged, state_dir=state_dir
    )


def _label_variants(live: LiveConfig, fleet: Fleet) -> None:
    """Has the fleet read variants and adapters as the catalogue in force says."""

    def label() -> None:
        fleet.use_variants(VariantLabels(live.catalogue, inferred_variant))

    label()
    live.changes.subscribe(label)


def _routes(live: LiveConfig, fleet: Fleet, endpoints: Endpoints, counts: CountTotals, room: EngineRoom) -> RouteTable:
    """The route table, which follows the catalogue in force and the limits of engines."""
    _label_variants(live, fleet)
    routes = RouteTable(fleet=fleet, endpoints=endpoints, counts=counts, limit=room.limit)
    live.changes.subscribe(routes.publish)
    room.changes.subscribe(routes.publish)
    return routes


def _demand(fleet: Fleet, counts: CountTotals, clock: Callable[[], float], device_time: DeviceTime) -> Demand:
    """The demand, which learns from the fleet when engines are loaded."""
    demand = Demand(counts, clock=clock, device_time=device_time)
    fleet.route_changes.subscribe(lambda models: demand.routes_changed(models, fleet.snapshot()))
    return demand


def _device_time(live: LiveConfig, state: StateFile, caller_of: Callable[[str], Caller | None]) -> DeviceTime:
    """The accounts of the API keys, as they were when the last cortex ended."""

    def half_life_secs() -> float:
        return live.config.placement.fairness_half_life_secs

    kept = state.device_time(half_life_secs())
    return DeviceTime(half_life_secs, kept, store=state.set_device_time, caller_of=caller_of)


@contextlib.asynccontextmanager
async def running_control(
    config: CortexConfig,
    catalogue: Catalogue,
    *,
    files: Sequence[str] = (),
    state: StateFile | None = None,
    database: Database | None = None,
    keys: KeyRing | None = None,
    broker: DialBroker | None = None,
) -> AsyncIterator[Parts]:
    """A control that watches its fleet inside the body. Needs a running event loop. `files` are the configuration's
    paths; without `state` nothing is kept over a restart. `database` stays the caller's; `keys` are loaded; the
    `broker` runs."""
    live, state = LiveConfig(config, catalogue, files), state or StateFile()
    listed = [(entry.name, entry.endpoint) for entry in config.neurons]
    fleet = Fleet(listed, unhealthy_after=config.poll.unhealthy_after, drained=state.drained)
    tls = await asyncio.to_thread(_neuron_tls, config)
    with contextlib.closing(EnginePool(IDLE_SECS, tls, broker=address_of(broker))) as pool:
        membership = Membership(pool, fleet, lambda: state.drained)
        decisions = await open_decisions(state, fleet, database)
        leases = LoadLeases(fleet, membership.clients, membership.pollers)
        limiter = await open_limiter(_model_terms(live, fleet), database)
        live.changes.subscribe(limiter.models_changed)
        sign_in = open_sign_in(live, database)
        keys, neurons = keys or KeyRing(), (membership.clients, membership.pollers)
        core = build(live, state, fleet, *neurons, leases=leases, limiter=limiter, caller_of=keys.caller)
        membership.configure(config.neurons, config.poll)
        core.metrics.polls = lambda: {name: poller.counts for name, poller in membership.pollers.items()}
        membership.moved.subscribe(core.routes.forget)
        discovery = await open_discovery(config.discovery, membership, fleet, pool, state, broker=broker)
        _use_keys(keys, core)
        loops = {**core.loops, **keys.loops, **discovery.loops, **decisions.loops}
        timeline, storage = _timeline(core), _storage(state, database)
        loops |= {"state file": state.write_loop, "limits": limiter.run, "storage": storage.run}
        loops |= {"timeline": timeline.run, "timeline file": timeline.write_loop}
        books = energy_books(database, live, fleet, core.counts.all_in_flight, core.metrics.energy)
        loops |= {name: each.run for name, each in (("sign-out", sign_in), ("energy", books)) if each is not None}
        loops |= {} if tls is None else {"TLS files": tls.watch_loop}
        try:
            async with running(loops):
                yield Parts(
                    **vars(core),
                    membership=membership,
                    broker=broker,
                    created=int(time.time()),
                    database=database,
                    keys=keys,
                    timeline=timeline,
                    requests=RequestHistory(),
                    sign_in=sign_in,
                    registrations=discovery.registrations,
                    decisions=decisions,
                    storage=storage,
                )
        finally:
            if sign_in is not None:
                await sign_in.close()
            await asyncio.gather(membership.close(), core.close(), limiter.close(), decisions.close())
            await timeline.flush()
            await state.close()


def _neuron_tls(config: CortexConfig) -> RenewedContext | None:
    """Blocks. Raises TlsError."""
    pems = config.neuron_tls.files
    return RenewedContext(pems, client_context) if pems.paths else None


def _storage(state: StateFile, database: Database | None) -> Storage:
    return Storage(state.directory, opened_unwritable=database is None or database.read_only)


def _timeline(core: ControlCore) -> Timeline:
    """Reads its file. Blocks."""

    def causes() -> list[Cause]:
        return [
            Cause(job.plan.key, job.why, tuple(each.resident.key for each in job.plan.eviction_plan.evictions))
            for job in core.loader.jobs()
        ]

    async def counts() -> ModelCounts:
        await core.counts.refresh()
        answered, errors = Counter[str](), Counter[str]()
        for (model, _), series in merged(core.counts.counters()).items():
            answered[model] += sum(series.statuses.values())
            errors[model] += sum(count for status, count in series.statuses.items() if status >= HTTPStatus.BAD_REQUEST)
        return ModelCounts(answered, errors)

    directory = core.state.directory
    return Timeline(
        core.fleet,
        causes=causes,
        waiting=lambda: {model: waiting.count for model, waiting in core.queue.waiting().items()},
        counts=counts,
        file=None if directory is None else TimelineFile(directory, core.state.acquire_lock),
    )


def _use_keys(keys: KeyRing, core: ControlCore) -> None:
    limiter, live = core.resolver.limiter, core.live

    def renew() -> None:
        limiter.use_keys(keys.limits)
        names = {key.name for key in keys.keys}
        core.counts.keep_callers(names)
        core.demand.keep_callers(names)

    renew()
    keys.changes.subscribe(renew)
    if live.files:
        file = Path(live.files[0])
        live.changes.subscribe(lambda: keys.configure(live.config.keys_path(file), live.config.usage.currency))


def _model_terms(live: LiveConfig, fleet: Fleet) -> ModelTermsTable:
    return ModelTermsTable(live, partial(_served_context, fleet))


def _served_context(fleet: Fleet, model_id: str) -> int | None:
    """The most tokens of context that an engine of the model serves now; None if unknown."""
    lengths = [engine.view.max_model_len for engine in fleet.snapshot().serving(model_id)]
    return max((length for length in lengths if length is not None), default=None)


async def follow_routes(fleet: Fleet, routes: RouteTable, scheduler: Scheduler, queue: AdmissionQueue) -> None:
    """Keeps the route table and the scheduler up to date with the fleet. Never returns."""
    with contextlib.closing(RouteChanges(fleet)) as changes:
        routes.publish()
        scheduler.routes_changed(list(queue.models))  # changes that an earlier, failed run has missed
        while True:
            models = await changes.next()
            routes.publish(models)
            scheduler.routes_changed(sorted(models))
