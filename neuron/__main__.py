"""The `neuron` command line. Each command imports what it needs when it runs, so that help and version are fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from shared.terminal.command_line import command_line, run_command

app = command_line("The agent on a GPU host: runs engines for a cortex.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="The configuration file, neuron.toml.")]


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="neuron.toml. Default: defaults and NEURON_* variables.")
    ] = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="An inherited, bound socket to listen on.")] = None,
    lifeline_fd: Annotated[int | None, typer.Option(hidden=True, help="Stop when this inherited pipe closes.")] = None,
) -> int:
    """Serve this host's GPUs."""
    from neuron.commands import run_serve

    return run_serve(config, fd=fd, lifeline=lifeline_fd)


@app.command()
def check(
    config: Annotated[Path, typer.Option(metavar="FILE", help="The configuration file, neuron.toml.")],
) -> int:
    """Validate neuron.toml, and print every problem."""
    from neuron.commands import run_check

    return run_check(config)


@app.command()
def discover(config: Config = None, as_json: Json = False) -> int:
    """Print this host's GPU topology."""
    from neuron.commands import run_discover

    return run_discover(config, as_json=as_json)


@app.command()
def estimate(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a name in the hub's local cache.")],
    max_model_len: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a sequence. Default: the model's maximum.")
    ] = None,
    max_num_seqs: Annotated[
        str | None, typer.Option(metavar="N", help="Sequences of that length at once. Default: 1.")
    ] = None,
    tensor_parallel: Annotated[
        str | None, typer.Option(metavar="N", help="Devices of a tensor group. Default: the fewest that it fits on.")
    ] = None,
    pipeline_parallel: Annotated[str | None, typer.Option(metavar="N", help="Pipeline stages. Default: 1.")] = None,
    data_parallel: Annotated[str | None, typer.Option(metavar="N", help="Copies in one engine. Default: 1.")] = None,
    quant: Annotated[str | None, typer.Option(metavar="Q", help="Quantization while loading, such as fp8.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(metavar="T", help="Data type of the KV cache, such as fp8.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> int:
    """Estimate how much memory a model needs, from its files."""
    from neuron.commands import run_estimate

    given = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "data_parallel": data_parallel,
        "quant": quant,
        "kv_cache_dtype": kv_cache_dtype,
    }
    options = {name: value for name, value in given.items() if value is not None}
    return run_estimate(config, model, options, as_json=as_json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status: 1 when it fails, 2 when the arguments are wrong."""
    return run_command(app, "neuron", argv)


if __name__ == "__main__":
    sys.exit(main())
