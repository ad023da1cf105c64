"""What handlers find in the app."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from neuron.api.leases import LeaseTable
from neuron.api.protocol_v1 import ProtocolV1
from neuron.config import NeuronConfig
from neuron.gpu.device_watch import DeviceWatch
from neuron.gpu.discovery import discovery_of
from neuron.gpu.energy.meter import EnergyMeter
from neuron.gpu.topology import TopologySource
from neuron.harness.home import EngineHome
from neuron.lifecycle.default_models import DefaultModels
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.events import EventHub
from neuron.lifecycle.group_network import GroupListeners, link_mbps
from neuron.lifecycle.registry import Registry
from neuron.lifecycle.serving.engine_adapters import EngineAdapters
from neuron.lifecycle.spare.spares import Spares
from neuron.metrics import NeuronMetrics
from shared.protocol import Discovery


@dataclass(frozen=True)
class Services:
    """Everything a handler may use; made by `neuron.app`, alive while the app serves."""

    config: NeuronConfig
    instance_id: str
    started: float  # monotonic
    source: TopologySource
    device_watch: DeviceWatch
    meter: EnergyMeter
    home: EngineHome
    memory: EngineMemory
    registry: Registry
    adapters: EngineAdapters
    v1: ProtocolV1
    hub: EventHub
    default_models: DefaultModels
    metrics: NeuronMetrics
    spares: Spares
    leases: LeaseTable
    group_listeners: GroupListeners

    async def discovery(self, address: str) -> Discovery:
        """`address` is the one of this host at which the caller has come."""
        mbps = await asyncio.to_thread(link_mbps, self.config.group, address)
        return await discovery_of(self.config, self.source, instance_id=self.instance_id, network_mbps=mbps)


SERVICES = web.AppKey("services", Services)


def called_at(request: web.Request) -> str:
    """The address of this host at which the caller has come."""
    own = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return str(own[0]) if own else request.app[SERVICES].config.host
