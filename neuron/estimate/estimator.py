"""Estimates the memory of a model before it is loaded; each kind of engine provides the rules."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from neuron.estimate.locate import model_at
from neuron.estimate.options import EngineOptions
from neuron.estimate.result import Estimate
from neuron.estimate.weights import ModelFiles
from neuron.gpu.topology import Topology
from neuron.spec import EngineSpec
from shared.protocol import Device


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
