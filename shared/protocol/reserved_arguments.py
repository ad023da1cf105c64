"""Arguments that no load command may contain, because neuron sets them itself. Pure.

They are vLLM's, whose command line the simulated engine shares. Here, so that `cortex check` refuses what a neuron
would refuse at the load.
"""

from __future__ import annotations

from collections.abc import Sequence

OWNED_FLAGS = (
    "--host",
    "--port",
    "--uds",
    "--root-path",
    "--api-key",
    "--config",
    "--headless",
    "--model",
    "--served-model-name",
    "--tensor-parallel-size",
    "--device-ids",
)
_OWNED_FAMILY = "--ssl-"  # with TLS neuron's health check over http would always fail


def refused_argument(args: Sequence[str]) -> str | None:
    """Why one of `args` cannot be passed to vLLM; None when all can.

    vLLM's parser accepts underscores for dashes, `--flag=value`, `--flag.key` and every unambiguous abbreviation:
    anything that could be read as an owned flag in one of these ways is refused.
    """
    for arg in args:
        if arg == "--":
            return "'--' would turn flags into operands"
        flag = owned_flag(arg)
        if flag is not None:
            return f"{arg!r}: {flag} is set by neuron"
    return None


def owned_flag(arg: str) -> str | None:
    """The owned flag that `arg` could be read as; None when it is another flag or a value."""
    name = flag_name(arg)
    if name in ("-t", "-tp"):  # -t is an abbreviation of -tp
        return "--tensor-parallel-size"
    if not name.startswith("--"):
        return None
    if name.startswith(_OWNED_FAMILY):
        return f"{_OWNED_FAMILY}*"
    return next((flag for flag in OWNED_FLAGS if flag.startswith(name)), None)


def flag_name(arg: str) -> str:
    """The flag in `--flag`, `--flag=value` or `--flag.key`, written with dashes."""
    return arg.partition("=")[0].partition(".")[0].replace("_", "-")
