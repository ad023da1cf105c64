"""How handlers reach what the app is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from cortex.catalogue import Catalogue
from cortex.config import CortexConfig
from cortex.counts import Counts
from cortex.fleet import Fleet
from cortex.live_config import LiveConfig
from cortex.loader import Loader
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient
from cortex.poller import NodeWatch
from cortex.roster import Roster
from cortex.router import Router
from cortex.scheduler import Scheduler
from cortex.state_file import StateFile
from cortex.stopping import Stopping
from cortex.waiting import WaitingRooms


@dataclass(frozen=True)
class Parts:
    """The collaborators of a running cortex. `created` is Unix time."""

    live: LiveConfig
    state: StateFile
    stopping: Stopping
    fleet: Fleet
    counts: Counts
    metrics: Metrics
    roster: Roster
    rooms: WaitingRooms
    loader: Loader
    scheduler: Scheduler
    router: Router
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
