"""`neuron estimate MODEL`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from neuron.config import NeuronConfig
from neuron.estimate import estimate_of_wish
from neuron.estimate.options import OPTIONS, with_options
from neuron.estimate.reply import reply_of, table_of
from neuron.estimate.wish import wish_of
from neuron.gpu.discovery import topology_source
from neuron.spec import EngineSpec
from shared.protocol import EstimateReply


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("estimate", help="work out the memory that a model will need, from its files")
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name in the hub's local cache")
    parser.add_argument("--max-model-len", metavar="N", help="tokens of a sequence (default: as long as the model can)")
    parser.add_argument("--max-num-seqs", metavar="N", help="sequences of that length at once (default 1)")
    parser.add_argument("--tensor-parallel", metavar="N", help="devices (default: as few as it fits on)")
    parser.add_argument("--quant", metavar="Q", help="quantisation while loading, such as fp8")
    parser.add_argument("--kv-cache-dtype", metavar="T", help="type of the KV cache's numbers, such as fp8")
    parser.add_argument("--json", action="store_true", help="as JSON, as GET /estimate answers")
    parser.add_argument("--config", type=Path, help="neuron.toml, for [harness.vllm] and [simulate]")


def run_estimate(config: NeuronConfig | None, arguments: argparse.Namespace) -> int:
    """Prints the sum, line by line. Without a config: this host's GPUs, and vLLM's defaults.

    Returns:
        The exit status: 0, also when the model fits nowhere here; that is an answer.

    Raises:
        ServiceError: the files are not on this host or broken, or a number is none.
        SettingsError: `[simulate]` names a device that is not known.
    """
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    reply = asyncio.run(_estimate_once(config or NeuronConfig(), arguments.model, options))
    sys.stdout.write(reply.model_dump_json(indent=2) + "\n" if arguments.json else table_of(reply))
    sys.stdout.flush()
    return 0


async def _estimate_once(config: NeuronConfig, name: str, options: Mapping[str, str]) -> EstimateReply:
    settings = config.harness_settings("vllm")
    spec = EngineSpec(model_id=name, harness="vllm", source=name, args=tuple(settings.extra_args))
    wish = with_options(replace(wish_of(spec), tensor_parallel=None), options)
    source = topology_source(config, config.state_directory(config.port) / "vram")
    try:
        topology = await source.discover()
    finally:
        await source.close()
    made = await estimate_of_wish(spec, wish, topology, {**os.environ, **settings.env})
    return reply_of(name, made)
