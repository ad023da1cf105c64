"""How much memory a model will need, from its own files: `estimate_of` is what the rest of neuron calls.

    locate ─▶ architecture, stored ─▶ sum ◀─ wish
                                       │
               weights, kv_cache, overhead, parallel

Everything but `locate`, `stored` and what is above them is pure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from neuron.estimate.locate import model_at
from neuron.estimate.result import Estimate
from neuron.estimate.sum import estimate
from neuron.estimate.wish import Wish, wish_of
from neuron.gpu.topology import Topology
from neuron.spec import EngineSpec

__all__ = ["Estimate", "Wish", "estimate_of", "estimate_of_wish", "wish_of"]


async def estimate_of(spec: EngineSpec, topology: Topology, environ: Mapping[str, str]) -> Estimate:
    """What an engine of `spec` will need on this host, split over `spec.tensor_parallel` devices.

    `environ` is the engine's, for the place of the hub's cache; the harness's `extra_args` belong at the end of
    `spec.args`. Reads the headers of the model's files, in a thread, once as long as they do not change.

    Raises:
        NotFound: `model_files_not_found`, the model's files are not on this host.
        InvalidRequest: a number among the arguments is none.
        ModelFilesInvalid: a file is broken or lacks what has to be known.
    """
    return await estimate_of_wish(spec, wish_of(spec), topology, environ)


async def estimate_of_wish(spec: EngineSpec, wish: Wish, topology: Topology, environ: Mapping[str, str]) -> Estimate:
    """As `estimate_of`, with a wish that is not, or not only, the spec's."""
    model = await asyncio.to_thread(
        model_at, spec.source, environ, revision=wish.revision, download_dir=wish.download_dir
    )
    devices = [device for device in topology.devices if spec.devices is None or device.index in spec.devices]
    return estimate(model, wish, devices)
