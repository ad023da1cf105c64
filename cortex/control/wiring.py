"""The parts of a running control, built in the order of their dependencies. Nothing else constructs them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import Demand
from cortex.control.endpoints import Endpoints
from cortex.control.load_backoff import Backoffs
from cortex.control.loader import Loader
from cortex.control.resolver import Resolver
from cortex.control.route_table import RouteTable
from cortex.control.scheduler import Scheduler
from cortex.control.shutdown import Shutdown
from cortex.fleet.membership import Membership
from cortex.fleet.neuron_client import IDLE_SECS, NeuronClient
from cortex.fleet.poller import NeuronPoller
from cortex.fleet.state import Fleet, RouteChanges
from cortex.fleet.store import StateFile
from cortex.metrics.exporter import Metrics
from cortex.metrics.worker_counts import CountTotals
from cortex.upstream.pool import EnginePool
from shared.tasks import running


@dataclass(frozen=True)
class Parts:
    """What `build` has made, for `cortex.app` and `cortex.cli.serve`, which give each object what it needs of it.
    `created` is Unix time."""

    live: LiveConfig
    state: StateFile
    shutdown: Shutdown
    fleet: Fleet
    counts: CountTotals
    metrics: Metrics
    membership: Membership
    queue: AdmissionQueue
    routes: RouteTable
    loader: Loader
    scheduler: Scheduler
    resolver: Resolver
    created: int

    @property
    def config(self) -> CortexConfig:
        """The configuration in force."""
        return self.live.config

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue in force."""
        return self.live.catalogue

    @property
    def clients(self) -> Mapping[str, NeuronClient]:
        """By neuron name, the present ones."""
        return self.membership.clients

    @property
    def pollers(self) -> Mapping[str, NeuronPoller]:
        """By neuron name, the present ones."""
        return self.membership.pollers


def build(live: LiveConfig, state: StateFile, fleet: Fleet, membership: Membership) -> Parts:
    """Everything that decides and acts, around the fleet. Starts nothing."""
    shutdown, counts, backoffs = Shutdown(), CountTotals(), Backoffs()
    clients, pollers = membership.clients, membership.pollers
    demand = Demand(counts)
    fleet.route_changes.subscribe(lambda models: demand.routes_changed(models, fleet.snapshot()))
    metrics = Metrics(fleet, counts.all_in_flight, counts.counters)
    queue = AdmissionQueue(live=live)
    shutdown.beginning.subscribe(queue.notify_all)
    endpoints = Endpoints(live=live, fleet=fleet, clients=clients, pollers=pollers)
    endpoints.refusals.subscribe(backoffs.record_refused_endpoint)
    routes = RouteTable(fleet=fleet, endpoints=endpoints, counts=counts)
    loader = Loader(
        live=live,
        fleet=fleet,
        clients=clients,
        pollers=pollers,
        counts=counts,
        metrics=metrics,
        state=state,
        settle_routes=routes.settle,
    )
    scheduler = Scheduler(live=live, fleet=fleet, loader=loader, demand=demand, backoffs=backoffs, queue=queue)
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
    )
    return Parts(
        live=live,
        state=state,
        shutdown=shutdown,
        fleet=fleet,
        counts=counts,
        metrics=metrics,
        membership=membership,
        queue=queue,
        routes=routes,
        loader=loader,
        scheduler=scheduler,
        resolver=resolver,
        created=int(time.time()),
    )


@contextlib.asynccontextmanager
async def running_control(
    config: CortexConfig, catalogue: Catalogue, *, files: Sequence[str] = (), state: StateFile | None = None
) -> AsyncIterator[Parts]:
    """A control that watches its fleet inside the body. Needs a running event loop. `files` are the configuration's
    paths; without `state` nothing is kept over a restart."""
    live, state = LiveConfig(config, catalogue, files), state or StateFile()
    fleet = Fleet(
        [(entry.name, entry.endpoint) for entry in config.neurons],
        unhealthy_after=config.poll.unhealthy_after,
        drained=state.drained,
    )
    live.changes.subscribe(fleet.notify)
    with contextlib.closing(EnginePool(IDLE_SECS)) as pool:
        parts = build(live, state, fleet, Membership(pool, fleet))
        parts.membership.configure(config.neurons, config.poll)
        try:
            loops: dict[str, Callable[[], Awaitable[None]]] = {
                "route changes": partial(follow_routes, fleet, parts.routes, parts.scheduler, parts.queue),
                "scheduler": parts.scheduler.run,
                "replica control": parts.scheduler.reconcile_loop,
                "state file": state.write_loop,
            }
            async with running(loops):
                yield parts
        finally:
            ending = (parts.membership, parts.loader, parts.scheduler, parts.routes)
            await asyncio.gather(*(part.close() for part in ending))
            await state.close()


async def follow_routes(fleet: Fleet, routes: RouteTable, scheduler: Scheduler, queue: AdmissionQueue) -> None:
    """Keeps the route table and the scheduler up to date with the fleet. Never returns."""
    with contextlib.closing(RouteChanges(fleet)) as changes:
        routes.publish()
        scheduler.routes_changed(list(queue.models))  # changes that an earlier, failed run has missed
        while True:
            models = await changes.next()
            routes.publish(models)
            scheduler.routes_changed(models)
