"""How this cortex finds neurons, as cortex.toml says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cortex.config.discovery import DiscoverySettings
from cortex.fleet.members.dialled.broker_process import DialBroker
from cortex.fleet.members.dns import DnsDiscovery
from cortex.fleet.members.found import FoundNeurons
from cortex.fleet.members.kubernetes.discovery import KubernetesDiscovery
from cortex.fleet.members.kubernetes.pod_api import PodApi
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.upstream.pool import EnginePool
from shared.system.cluster import cluster_here


@dataclass(frozen=True)
class NeuronDiscovery:
    """`loops` have to run all the time, by name. `registrations` is None unless neurons announce themselves."""

    loops: Mapping[str, Callable[[], Awaitable[None]]]
    registrations: Registrations | None = None


async def open_discovery(
    settings: DiscoverySettings,
    membership: Membership,
    fleet: Fleet,
    pool: EnginePool,
    state: StateFile,
    *,
    broker: DialBroker | None = None,
) -> NeuronDiscovery:
    """Returns when the neurons that can be found now are in the fleet, so that the first request finds them. `broker`:
    None unless neurons may keep connections to this cortex.

    Raises:
        NotInCluster: with `kind = "kubernetes"`, outside a cluster.
    """
    if settings.kind == "register":
        registrations = Registrations(membership, fleet, state, broker)
        registrations.restore()
        return NeuronDiscovery({"registrations": registrations.run}, registrations)
    state.set_registrations([])  # they have tokens, and are of no more use
    if settings.kind == "dns":
        found = FoundNeurons(settings, membership, fleet, pool, grace_secs=settings.grace_secs)
        dns = DnsDiscovery(settings, found)
        await dns.look()
        return NeuronDiscovery({"DNS discovery": dns.run})
    if settings.kind == "kubernetes":
        found = FoundNeurons(settings, membership, fleet, pool, grace_secs=0)
        cluster = await asyncio.to_thread(cluster_here, os.environ)
        pods = KubernetesDiscovery(settings, found, PodApi(cluster, settings.namespace, settings.selector or ""))
        await pods.look()
        return NeuronDiscovery({"pods": pods.follow_loop, "names of pods": pods.ask_loop})
    return NeuronDiscovery({})
