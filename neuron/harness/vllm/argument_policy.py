"""How to find a flag of vLLM among arguments. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shared.protocol.reserved_arguments import flag_name

_EXECUTOR = "--distributed-executor-backend"


def flag_value(args: Sequence[str], *flags: str) -> str | None:
    """The value of the last of `flags` (written with dashes) in `args`; None when there is none."""
    found = None
    for place, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name.replace("_", "-") in flags:
            found = value if given else args[place + 1] if place + 1 < len(args) else None
    return found


def has_flag(args: Sequence[str], *flags: str) -> bool:
    """True when one of `flags` (written with dashes) is in `args`."""
    return any(arg.partition("=")[0].replace("_", "-") in flags for arg in args)


def refused_in_group(args: Sequence[str]) -> str | None:
    """Why vLLM's multi-node engine would refuse `args`: it has only the executor `mp`. Sees abbreviations too."""
    for place, arg in enumerate(args):
        name = flag_name(arg)
        if name.startswith("--di") and _EXECUTOR.startswith(name):
            _, given, value = arg.partition("=")
            backend = value if given else args[place + 1] if place + 1 < len(args) else ""
            if backend != "mp":
                return f"{arg!r}: {_EXECUTOR} {backend} cannot span hosts in this way"
    return None
