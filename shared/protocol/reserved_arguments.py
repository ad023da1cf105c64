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
    "--device-ids",
    "--master-addr",
    "--master-port",
)
_OWNED_FAMILY = "--ssl-"  # with TLS neuron's health check over http would always fail
PARALLEL_FLAGS = {
    "--tensor-parallel-size": "-tp",
    "--pipeline-parallel-size": "-pp",
    "--prefill-context-parallel-size": "-pcp",
    "--data-parallel-size": "-dp",
    "--data-parallel-size-local": "-dpl",
    "--data-parallel-rank": "-dpn",
    "--data-parallel-start-rank": "-dpr",
    "--data-parallel-hybrid-lb": "-dph",
    "--data-parallel-external-lb": "-dpe",
    "--data-parallel-multi-port-external-lb": "-dpm",
    "--enable-expert-parallel": "-ep",
    "--nnodes": "-n",
    "--node-rank": "-r",
}
"""Flags that decide how many devices an engine has and which rank runs where, with their short forms. neuron builds
them from `parallel`, which also decides how many devices it books."""
_SWITCHES = ("--data-parallel-hybrid-lb", "--data-parallel-external-lb", "--enable-expert-parallel")
"""Those with a `--no-` form."""


CONTEXT_FLAG = "--max-model-len"
_LIKE_CONTEXT_FLAG = "--max-mo"  # the shortest abbreviation that vLLM's parser takes for it alone


def sets_context(args: Sequence[str]) -> bool:
    """True if one of `args` sets the context length of a vLLM."""
    names = (flag_name(arg) for arg in args)
    return any(name.startswith(_LIKE_CONTEXT_FLAG) and CONTEXT_FLAG.startswith(name) for name in names)


def refused_argument(args: Sequence[str]) -> str | None:
    """Why one of `args` cannot be passed to vLLM; None when all can.

    vLLM's parser accepts underscores for dashes, `--flag=value`, `--flag.key` and every unambiguous abbreviation:
    anything that could be read as an owned flag in one of these ways is refused.
    """
    for arg in args:
        if arg == "--":
            return "'--' would turn flags into operands"
        flag = owned_flag(arg)
        if flag in PARALLEL_FLAGS:
            return f"{arg!r}: {flag} is set by neuron, use `parallel = {{ tensor, pipeline, data, expert }}`"
        if flag is not None:
            return f"{arg!r}: {flag} is set by neuron"
    return None


def owned_flag(arg: str) -> str | None:
    """The owned flag that `arg` could be read as; None when it is another flag or a value."""
    name = flag_name(arg)
    if not name.startswith("--"):
        return _owned_short_flag(name)
    if name.startswith(_OWNED_FAMILY):
        return f"{_OWNED_FAMILY}*"
    for flag in (*OWNED_FLAGS, *PARALLEL_FLAGS):
        if flag.startswith(name) or (flag in _SWITCHES and f"--no-{flag.removeprefix('--')}".startswith(name)):
            return flag
    return None


def _owned_short_flag(name: str) -> str | None:
    """For `-x`: argparse abbreviates short flags too, and takes the value of one with a single letter without a space
    (`-n2`)."""
    if len(name) < 2 or name[0] != "-":
        return None
    for flag, short in PARALLEL_FLAGS.items():
        if short.startswith(name) or (len(short) == 2 and name.startswith(short) and name[2:].isdigit()):
            return flag
    return None


def flag_name(arg: str) -> str:
    """The flag in `--flag`, `--flag=value` or `--flag.key`, written with dashes."""
    return arg.partition("=")[0].partition(".")[0].replace("_", "-")
