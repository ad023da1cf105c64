"""How handlers reach what the app is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.config.settings import CortexConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.loader import Loader
from cortex.control.resolver import Resolver
from cortex.control.scheduler import Scheduler
from cortex.fleet.membership import Membership
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.poller import NodeWatch
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.http.stopping import Stopping
from cortex.metrics.exporter import Metrics
from cortex.metrics.worker_counts import CountTotals


@dataclass(frozen=True)
class Parts:
    """The collaborators of a running cortex. `created` is Unix time."""

    live: LiveConfig
    state: StateFile
    stopping: Stopping
    fleet: Fleet
    counts: CountTotals
    metrics: Metrics
    roster: Membership
    rooms: AdmissionQueue
    loader: Loader
    scheduler: Scheduler
    router: Resolver
    created: int

    @property
    def config(self) -> CortexConfig:
        """What holds now."""
        return self.live.config

    @property
    def catalogue(self) -> Catalogue:
        """What holds now."""
        return self.live.catalogue

    @property
    def clients(self) -> Mapping[str, NeuronClient]:
        """By neuron, those of now."""
        return self.roster.clients

    @property
    def watches(self) -> Mapping[str, NodeWatch]:
        return self.roster.watches


PARTS = web.AppKey("parts", Parts)
