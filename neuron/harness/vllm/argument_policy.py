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


def executor(args: Sequence[str]) -> str | None:
    """vLLM's executor for several workers that `args` choose last; None if they choose none. Sees abbreviations too."""
    found = None
    for place, arg in enumerate(args):
        name = flag_name(arg)
        if name.startswith("--di") and _EXECUTOR.startswith(name):
            _, given, value = arg.partition("=")
            found = value if given else args[place + 1] if place + 1 < len(args) else ""
    return found


def refused_in_group(args: Sequence[str]) -> str | None:
    """Why `args` cannot span hosts: vLLM's multi-node engine has the executor `mp`, and the other way is `ray`."""
    chosen = executor(args)
    if chosen in (None, "mp", "ray"):
        return None
    return f"{_EXECUTOR} {chosen} cannot span hosts, use mp or ray"
