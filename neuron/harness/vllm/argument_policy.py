"""Arguments that would override what neuron decides itself."""

from __future__ import annotations

import re
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
_OWNED_FAMILY = "--ssl-"  # with TLS the engine's own health check over http would never pass
_SHELL = re.compile(r"[`;|&<>]|\$[({\w]")
_CONTROL = frozenset(map(chr, (*range(32), 127)))


def refusal(args: Sequence[str]) -> str | None:
    """Why one of `args` cannot be passed to an engine; None when all can.

    vLLM's parser takes underscores for dashes, `--flag=value`, `--flag.key` and every unambiguous abbreviation: what
    could be read as an owned flag in any of these ways is refused.
    """
    for arg in args:
        if not _CONTROL.isdisjoint(arg):
            return f"{arg!r} has control characters"
        if arg == "--":
            return "'--' would turn flags into operands"
        flag = owned_flag(arg)
        if flag is not None:
            return f"{arg!r}: {flag} is set by neuron"
    return None


def shell_word(args: Sequence[str]) -> str | None:
    """Why one of `args` is refused from outside: it could be read as a shell word, or is a path that climbs out.

    No shell ever sees an argument; what runs an engine may be a script that hands it to one. JSON values are exempt:
    vLLM needs them, and they hold such characters by nature.
    """
    for arg in args:
        value = arg.partition("=")[2] if arg.startswith("-") else arg
        if value.startswith(("{", "[")):
            continue
        if ".." in value.split("/"):
            return f"{arg!r}: '..' is not allowed in it"
        if _SHELL.search(value):
            return f"{arg!r} could be read as a shell word"
    return None


def owned_flag(arg: str) -> str | None:
    """The owned flag that `arg` could be read as, None when it is another flag or a value."""
    name = arg.partition("=")[0].partition(".")[0].replace("_", "-")
    if name in ("-t", "-tp"):  # -t is an abbreviation of -tp
        return "--tensor-parallel-size"
    if not name.startswith("--"):
        return None
    if name.startswith(_OWNED_FAMILY):
        return f"{_OWNED_FAMILY}*"
    return next((flag for flag in OWNED_FLAGS if flag.startswith(name)), None)


def value_of(args: Sequence[str], *flags: str) -> str | None:
    """The value that the last of the flags (written with dashes) among `args` has; None without one."""
    found = None
    for place, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name.replace("_", "-") in flags:
            found = value if given else args[place + 1] if place + 1 < len(args) else None
    return found


def gives(args: Sequence[str], *flags: str) -> bool:
    """True when one of the flags (written with dashes) is among `args`."""
    return any(arg.partition("=")[0].replace("_", "-") in flags for arg in args)
