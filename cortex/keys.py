"""How handlers reach what the app is made of."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from aiohttp import web

from cortex.catalogue import Catalogue
from cortex.config import CortexConfig
from cortex.fleet import Fleet
from cortex.in_flight import InFlight
from cortex.loader import Loader
from cortex.metrics import Metrics
from cortex.neuron_client import NeuronClient
from cortex.poller import NodeWatch
from cortex.proxy.forward import Forwarder


@dataclass(frozen=True)
class Parts:
    """The collaborators of a running cortex. `created` is Unix time."""

    config: CortexConfig
    catalogue: Catalogue
    fleet: Fleet
    in_flight: InFlight
    metrics: Metrics
    session: aiohttp.ClientSession
    clients: dict[str, NeuronClient]
    watches: dict[str, NodeWatch]
    loader: Loader
    forwarder: Forwarder
    created: int


PARTS = web.AppKey("parts", Parts)
