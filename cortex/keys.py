"""How handlers reach what the app is made of."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from cortex.catalogue import Catalogue
from cortex.config import CortexConfig
from cortex.counts import Counts
from cortex.fleet import Fleet
from cortex.loader import Loader
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient
from cortex.poller import NodeWatch
from cortex.router import Router


@dataclass(frozen=True)
class Parts:
    """The collaborators of a running cortex. `created` is Unix time."""

    config: CortexConfig
    catalogue: Catalogue
    fleet: Fleet
    counts: Counts
    metrics: Metrics
    clients: dict[str, NeuronClient]
    watches: dict[str, NodeWatch]
    loader: Loader
    router: Router
    created: int


PARTS = web.AppKey("parts", Parts)
