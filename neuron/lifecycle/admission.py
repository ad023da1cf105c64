"""Checks of a load before memory is booked: can this host serve it, is its path allowed, how much memory it needs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuron.config import NeuronConfig
from neuron.estimate.estimator import AvailableMemory, estimate_of, longest_context_of
from neuron.gpu.topology import Topology, TopologySource
from neuron.harness.adapters import CONFIG_FILE, AdapterControl
from neuron.harness.home import EngineHome
from neuron.harness.registry import harness_of
from neuron.lifecycle.failure_cause import because
from neuron.memory.selection import check_devices
from neuron.progress.history import LoadHistory
from neuron.progress.load_times import LoadKey
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest, ServiceError, Unavailable
from shared.protocol import ErrorCode, FailureCause
from shared.protocol.context_length import AUTO
from shared.retry_after import GPU_UNUSABLE_SECS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admission:
    """Checks specs against this host, its configuration and what earlier engines used."""

    config: NeuronConfig
    source: TopologySource
    history: LoadHistory
    home: EngineHome

    async def check(self, spec: EngineSpec) -> None:
        """Refuses what this host cannot serve.

        Raises:
            InvalidRequest: an unknown device, or a path outside `model_roots`.
            Unavailable: the engine needs a GPU, there is an NVIDIA driver, and it does not work.
        """
        topology = await self.source.discover()
        if (
            not spec.without_devices
            and harness_of(spec.harness, self.config).runs_on_gpu
            and topology.cuda_unavailable_reason
            and not topology.devices
        ):
            reason = f"this host's GPUs cannot be used: {topology.cuda_unavailable_reason}"
            raise Unavailable(reason, code=ErrorCode.CUDA_UNAVAILABLE, retry_after=GPU_UNUSABLE_SECS)
        check_devices(spec, topology)
        await check_model_roots(spec.source, self.config.model_roots, param="source")

    async def fitted(self, spec: EngineSpec) -> EngineSpec:
        """`spec` with what it leaves to this host's files: the longest context that fits, and the highest rank of its
        LoRA adapters."""
        spec = await self._with_context(spec)
        control = harness_of(spec.harness, self.config).adapters
        if spec.max_loras is None or spec.max_lora_rank is not None or control is None:
            return spec
        return replace(spec, fitted_rank=await asyncio.to_thread(highest_rank, control, spec.lora_sources))

    async def _with_context(self, spec: EngineSpec) -> EngineSpec:
        """`spec` with the longest context that fits, if it asks for that and the model's files say enough. On devices
        that neuron is free to choose, that is the context for the largest ones."""
        topology = await self.source.discover()
        harness, settings = harness_of(spec.harness, self.config), self.config.harness_settings(spec.harness)
        if spec.max_model_len != AUTO or harness.estimator is None:
            return spec
        devices = [device for device in topology.devices if spec.devices is None or device.index in spec.devices]
        sizes = sorted((device.vram_total_mb for device in devices if device.usable), reverse=True)
        ram_mb = _usable_ram_mb(spec, topology)
        if ram_mb is None and len(sizes) < spec.device_count:
            return replace(spec, fitted_len=None)
        whole = replace(spec, args=(*spec.args, *settings.extra_args), fitted_len=None)
        try:
            share = harness.estimator.options_of(whole).memory_fraction or harness.estimator.usable_share
            if ram_mb is None:
                limit = int(sizes[spec.device_count - 1] * share)
            else:
                limit = (ram_mb - harness.estimator.in_ram_mb) // spec.device_count
            memory = AvailableMemory(devices, spec.tensor_parallel, spec.share_mb or limit)
            length = await longest_context_of(harness.estimator, whole, await self._environ_of(spec), memory)
        except ServiceError as error:
            log.info("%s: the context that fits cannot be estimated: %s", spec.key, error.message)
            length = None
        if length:
            log.info("%s: a context of %d tokens fits", spec.key, length)
        return replace(spec, fitted_len=length)

    async def _environ_of(self, spec: EngineSpec) -> dict[str, str]:
        """What its engine finds its model's files with."""
        settings, harness = self.config.harness_settings(spec.harness), harness_of(spec.harness, self.config)
        environ = {**os.environ, **settings.env}
        caches = harness.cache_variables
        return await asyncio.to_thread(self.home.usable, environ, model=spec.source, caches=caches)

    async def share_of(self, spec: EngineSpec) -> int | None:
        """MiB that the engine takes on each device, or for each rank in RAM: from the spec, as much as an earlier
        engine of the model used in RAM, or estimated from the model's files. None leaves it to the engine's default:
        the files are not on this host, lack a figure, or need more than the default."""
        topology = await self.source.discover()
        ram_mb = _usable_ram_mb(spec, topology)
        in_ram = ram_mb is not None
        harness = harness_of(spec.harness, self.config)
        estimator = harness.estimator
        if spec.vram_mb is not None:
            return spec.share_mb
        if in_ram and not harness.sizes_itself and (used := self.history.ram_mb(LoadKey.of(spec))) is not None:
            return -(-used // spec.device_count)
        if estimator is None or not (topology.devices or in_ram):
            return None
        if spec.max_model_len == AUTO and spec.fitted_len != 0:
            return None  # the context was fitted to the engine's default
        settings = self.config.harness_settings(spec.harness)
        environ = await self._environ_of(spec)
        whole = replace(spec, args=(*spec.args, *settings.extra_args))
        try:
            found = await estimate_of(estimator, whole, topology, environ)
        except ServiceError as error:
            log.info("%s: its memory cannot be estimated: %s", spec.key, error.message)
            return None
        share = found.per_device_mb(spec.tensor_parallel)
        if ram_mb is not None:
            share += estimator.in_ram_mb // spec.device_count
            usable_mb: float = ram_mb
        else:
            largest = max((device.vram_total_mb for device in topology.devices if device.usable), default=0)
            usable_mb = estimator.usable_share * largest
        return None if found.unknown or share > usable_mb else share


def highest_rank(control: AdapterControl, sources: Sequence[str]) -> int | None:
    """Of the adapters at these sources; None if one of them is not a directory here that says its rank. Blocks."""
    ranks = []
    for source in sources:
        try:
            config = json.loads((Path(source) / CONFIG_FILE).read_bytes())
        except (OSError, ValueError):
            return None
        ranks.append(control.rank_of(config) if isinstance(config, dict) else None)
    known = [rank for rank in ranks if rank is not None]
    return max(known, default=None) if len(known) == len(ranks) else None


def _usable_ram_mb(spec: EngineSpec, topology: Topology) -> int | None:
    """MiB of RAM for an engine that runs on the host's CPU; None for one on devices, or if the RAM is unknown."""
    if topology.ram is None or (topology.devices and not spec.without_devices):
        return None
    return topology.ram.vram_total_mb - topology.ram_reserve_mb


async def check_model_roots(source: str, roots: Sequence[Path], *, param: str) -> None:
    """Refuses a path outside of `roots`. Accepts everything without roots, and names that are not paths on this host.

    Raises:
        InvalidRequest: names `param`, the path and the roots.
    """
    if roots and not await asyncio.to_thread(is_below, source, roots):
        listed = ", ".join(map(str, roots))
        # Another host may have other roots, so the cause is the node.
        reason, extra = f"{param}: {source!r} is outside of model_roots ({listed})", because(FailureCause.NODE)
        raise InvalidRequest(reason, param=param, extra=extra)


def is_below(source: str, roots: Sequence[Path]) -> bool:
    """True for a path that resolves to a place below one of `roots`, and for a name that is not a path here. Blocks."""
    path = Path(source)
    try:
        if not path.is_absolute() and not path.exists():
            return True
        real = path.resolve()
    except (OSError, RuntimeError):  # a name too long for a path; a loop of links
        return False
    return any(real.is_relative_to(root.resolve()) for root in roots)


def is_missing_path(source: str) -> bool:
    """True for an absolute path that does not exist on this host. Blocks."""
    return source.startswith("/") and not os.path.lexists(source)
