"""Estimates the memory of a model before it is loaded; each kind of engine provides the rules."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from neuron.estimate.locate import model_at
from neuron.estimate.options import EngineOptions
from neuron.estimate.result import Estimate
from neuron.estimate.weights import ModelFiles
from neuron.gpu.topology import Topology
from neuron.spec import EngineSpec
from shared.protocol import Device


@dataclass(frozen=True)
class AvailableMemory:
    """What a model has to fit into: `limit_mb` MiB on each of its devices, in tensor groups of `tensor_parallel`."""

    devices: Sequence[Device]
    tensor_parallel: int
    limit_mb: int


class MemoryEstimator(ABC):
    """The rules of one kind of engine. Pure."""

    usable_share: float = 1.0
    """Fraction of a device that an engine can use."""
    in_ram_mb: int = 0
    """MiB that the processes of an engine on the CPU use in addition to what the model needs."""

    @abstractmethod
    def options_of(self, spec: EngineSpec) -> EngineOptions:
        """What the spec and its arguments ask for.

        Raises:
            InvalidRequest: an argument that must be a number is not one.
        """

    @abstractmethod
    def estimate(self, model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> Estimate:
        """The memory for `options.tensor_parallel` devices, or for the smallest sufficient number of `devices` (1
        if none is), and for each other number. Lost devices do not count."""


_STEP = 256  # tokens: fitted lengths are multiples of it
_CERTAIN_SHARE = 0.95
"""Fraction of the available memory that a fitted context may need by the estimate: too short a context is better than
an engine that does not start."""


def longest_context(
    estimator: MemoryEstimator, model: ModelFiles, options: EngineOptions, memory: AvailableMemory
) -> int | None:
    """The most tokens of context with which the model fits, a multiple of 256; 0 if all of its own context does. None
    if that cannot be said: an item of the estimate is unknown, or too little is left for any."""
    if options.kv_cache_bytes is not None:  # it does not depend on the context
        return None
    limit = memory.limit_mb * _CERTAIN_SHARE

    def needed(tokens: int | None) -> Estimate:
        return estimator.estimate(model, replace(options, max_model_len=tokens), memory.devices)

    own = needed(None)
    if own.unknown:
        return None
    if own.per_device_mb(memory.tensor_parallel) <= limit:
        return 0
    fits, too_long = 0, -(-own.max_model_len // _STEP)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if needed(middle * _STEP).per_device_mb(memory.tensor_parallel) <= limit:
            fits = middle
        else:
            too_long = middle
    return fits * _STEP or None


async def longest_context_of(
    estimator: MemoryEstimator, spec: EngineSpec, environ: Mapping[str, str], memory: AvailableMemory
) -> int | None:
    """`longest_context` for an engine of `spec`. Arguments and exceptions: see `estimate_of`."""
    options = estimator.options_of(spec)
    model = await asyncio.to_thread(
        model_at, spec.source, environ, revision=options.revision, download_dir=options.download_dir
    )
    return longest_context(estimator, model, options, memory)


async def estimate_of(
    estimator: MemoryEstimator,
    spec: EngineSpec,
    topology: Topology,
    environ: Mapping[str, str],
    options: EngineOptions | None = None,
) -> Estimate:
    """What an engine of `spec` will need on this host; `options` replace those of the spec.

    `environ` is the engine's, for the location of the hub's cache; the operator's `extra_args` belong at the end of
    `spec.args`. Reads the headers of the model's files in a thread, again only when they have changed.

    Raises:
        NotFound: `model_files_not_found`, the model's files are not on this host.
        InvalidRequest: an argument that must be a number is not one.
        ModelFilesInvalid: a file is broken or lacks required information.
    """
    options = options or estimator.options_of(spec)
    model = await asyncio.to_thread(
        model_at, spec.source, environ, revision=options.revision, download_dir=options.download_dir
    )
    devices = [device for device in topology.devices if spec.devices is None or device.index in spec.devices]
    return estimator.estimate(model, options, devices)
