"""How to find a flag of vLLM among arguments. Pure."""

from __future__ import annotations

from collections.abc import Sequence


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
