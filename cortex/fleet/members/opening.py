"""How this cortex finds neurons, as cortex.toml says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cortex.config.discovery import DiscoverySettings
from cortex.fleet.members.dialled.broker_process import DialBroker
from cortex.fleet.members.dns import DnsDiscovery
from cortex.fleet.members.membership import Membership
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.state import Fleet
from cortex.upstream.pool import EnginePool


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
    broker: DialBroker | None = None,
) -> NeuronDiscovery:
    """Returns when the neurons that DNS has now are in the fleet, so that the first request finds them. `broker`: None
    unless neurons may keep connections to this cortex."""
    if settings.kind == "register":
        registrations = Registrations(membership, fleet, broker)
        return NeuronDiscovery({"registrations": registrations.run}, registrations)
    if settings.kind == "dns":
        dns = DnsDiscovery(settings, membership, fleet, pool)
        await dns.look()
        return NeuronDiscovery({"DNS discovery": dns.run})
    return NeuronDiscovery({})
