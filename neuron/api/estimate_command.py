"""`neuron estimate MODEL`: what `GET /estimate` answers, without a running neuron."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from neuron.config import DEFAULT_HARNESS, NeuronConfig
from neuron.estimate.estimator import estimate_of
from neuron.estimate.options import OPTIONS, with_options
from neuron.estimate.reply import reply_of, table_of
from neuron.gpu.discovery import topology_source
from neuron.harness.registry import HARNESSES
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import EstimateReply


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("estimate", help="estimate how much memory a model needs, from its files")
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name in the hub's local cache")
    parser.add_argument("--max-model-len", metavar="N", help="tokens of a sequence (default: the model's maximum)")
    parser.add_argument("--max-num-seqs", metavar="N", help="sequences of that length at once (default 1)")
    parser.add_argument("--tensor-parallel", metavar="N", help="devices (default: the fewest that it fits on)")
    parser.add_argument("--quant", metavar="Q", help="quantization while loading, such as fp8")
    parser.add_argument("--kv-cache-dtype", metavar="T", help="data type of the KV cache, such as fp8")
    parser.add_argument("--json", action="store_true", help="as JSON, as GET /estimate answers")
    parser.add_argument("--config", type=Path, help=f"neuron.toml, for [harness.{DEFAULT_HARNESS}] and [simulate]")


def run_estimate(config: NeuronConfig | None, arguments: argparse.Namespace) -> int:
    """Prints the estimate line by line. Without a config it uses this host's GPUs and the engine's defaults.

    Returns:
        The exit status: 0, also when the model does not fit on this host.

    Raises:
        ServiceError: the files are missing or broken, or an option is not a number.
        SettingsError: `[simulate]` names an unknown device.
    """
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    reply = asyncio.run(_estimate_once(config or NeuronConfig(), arguments.model, options))
    sys.stdout.write(reply.model_dump_json(indent=2) + "\n" if arguments.json else table_of(reply))
    sys.stdout.flush()
    return 0


async def _estimate_once(config: NeuronConfig, name: str, options: Mapping[str, str]) -> EstimateReply:
    estimator = HARNESSES[DEFAULT_HARNESS].estimator
    if estimator is None:
        raise InvalidRequest(f"the harness {DEFAULT_HARNESS!r} estimates no memory")
    settings = config.harness_settings(DEFAULT_HARNESS)
    spec = EngineSpec(model_id=name, harness=DEFAULT_HARNESS, source=name, args=tuple(settings.extra_args))
    served = with_options(replace(estimator.options_of(spec), tensor_parallel=None), options)
    source = topology_source(config, config.state_directory(config.port) / "vram")
    try:
        topology = await source.discover()
    finally:
        await source.close()
    made = await estimate_of(estimator, spec, topology, {**os.environ, **settings.env}, served)
    return reply_of(name, made)
