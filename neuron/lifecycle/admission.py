"""Whether this host takes a model, and what is booked for it, before anything of its engine exists."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from neuron.config import NeuronConfig
from neuron.estimate.estimator import estimate_of
from neuron.gpu.topology import Topology, TopologySource
from neuron.harness.registry import HARNESSES
from neuron.lifecycle.model_roots import check_below
from neuron.memory.ledger import Ledger
from neuron.memory.placement import EnginePlacement
from neuron.memory.selection import check_devices
from neuron.spec import EngineSpec
from shared.errors import ServiceError, Unavailable
from shared.protocol import DeviceHealth, ErrorCode
from shared.retry_after import GPU_UNUSABLE_SECS

log = logging.getLogger(__name__)

_MEMORY_POLL_SECS = 0.1


@dataclass(frozen=True)
class Admission:
    """Checks specs, and books devices and memory for them."""

    config: NeuronConfig
    source: TopologySource
    ledger: Ledger = field(default_factory=Ledger)

    async def check(self, spec: EngineSpec) -> None:
        """Refuses what this host cannot serve, before anything is started.

        Raises:
            InvalidRequest: an unknown device, or a path outside `model_roots`.
            Unavailable: the engine needs a GPU, there is an NVIDIA driver, and it cannot be used.
        """
        topology = await self.source.discover()
        if HARNESSES[spec.harness].runs_on_gpu and topology.cuda_unavailable_reason and not topology.devices:
            reason = f"this host's GPUs cannot be used: {topology.cuda_unavailable_reason}"
            raise Unavailable(reason, code=ErrorCode.CUDA_UNAVAILABLE, retry_after=GPU_UNUSABLE_SECS)
        check_devices(spec, topology)
        await check_below(spec.source, self.config.model_roots, param="source")

    async def share_of(self, spec: EngineSpec, topology: Topology) -> int | None:
        """MiB that the engine is to take on each device: what the spec says, else what its model's own files say. None,
        and with that the engine's own default: they are not on this host, or do not tell everything, or tell of more
        than the default."""
        estimator = HARNESSES[spec.harness].estimator
        if spec.vram_mb is not None or not topology.devices or estimator is None:
            return spec.share_mb
        settings = self.config.harness_settings(spec.harness)
        whole = replace(spec, args=(*spec.args, *settings.extra_args))
        try:
            found = await estimate_of(estimator, whole, topology, {**os.environ, **settings.env})
        except ServiceError as error:
            log.info("%s: its memory is not known beforehand: %s", spec.model_id, error.message)
            return None
        share = found.per_device_mb(spec.tensor_parallel)
        largest = max(device.vram_total_mb for device in topology.devices)
        return None if found.unknown or share > estimator.usable_share * largest else share

    def book(
        self,
        number: int,
        spec: EngineSpec,
        share_mb: int | None,
        topology: Topology,
        health: Sequence[DeviceHealth],
    ) -> EnginePlacement:
        """Devices and memory for a run; its own until `ledger.release`. Nothing is awaited.

        Raises:
            InsufficientVram: its memory is not to be had. InvalidRequest: as `neuron.memory.selection.check_devices`.
        """
        # Arguments that size the engine's memory outweigh `share_mb`, since the engine goes by them.
        args = [*spec.args, *self.config.harness_settings(spec.harness).extra_args]
        need = HARNESSES[spec.harness].memory_need(spec, share_mb, args)
        choice = self.ledger.book(number, spec, need, topology, health)
        return EnginePlacement(number, choice.devices, choice.booked_mb, share_mb, choice.why)

    async def until_memory_is_back(self, number: int) -> None:
        """Returns when no engine that is being stopped holds memory that was promised to run `number`."""
        while True:
            topology, health = await asyncio.gather(self.source.discover(), self.source.health())
            if not self.ledger.awaited(number, topology, health):
                return
            await asyncio.sleep(_MEMORY_POLL_SECS)
