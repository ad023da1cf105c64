"""What the command of an engine runs: which interpreter, and which script or module."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PYTHON = re.compile(r"python[\d.]*")
_FLAG = re.compile(r"-[BEIOPSsuv]+")
_HEAD_BYTES = 4096
# What pip writes when the interpreter's path is too long, or has a space, for the first line.
_EXEC = re.compile(r"""\A'''exec' ("?)(?P<path>/[^"\n]*?)\1 "\$0" "\$@"$""", re.MULTILINE)


class NotPython(Exception):
    """The command does not run a Python program; the message says why."""


@dataclass(frozen=True)
class Program:
    """`interpreter` is its path and flags. `path` is the script; with a `module` it is the interpreter. `name` is that
    of the process, as `ps` and `top` show it: the file that the last exec ran, before a `#!` line is followed."""

    interpreter: tuple[str, ...]
    path: str
    module: str | None
    arguments: tuple[str, ...]
    name: str


def program_of(argv: Sequence[str], env: Mapping[str, str]) -> Program:
    """The program of a command line: `SCRIPT ARG…` with a first line that names a Python, `PYTHON -m MODULE ARG…` or
    `PYTHON SCRIPT ARG…`. Blocks.

    Raises:
        NotPython: it is none of these.
    """
    found = shutil.which(argv[0], path=env.get("PATH"))
    if found is None:
        raise NotPython(f"{argv[0]} is not an executable")
    if not _PYTHON.fullmatch(Path(found).name):
        interpreter, name = _interpreter_of(Path(found), env)
        return Program(interpreter, found, None, tuple(argv[1:]), name)
    rest = list(argv[1:])
    flags = []
    while rest and _FLAG.fullmatch(rest[0]):
        flags.append(rest.pop(0))
    if len(rest) >= 2 and rest[0] == "-m":
        return Program((found, *flags), found, rest[1], tuple(rest[2:]), Path(found).name)
    if rest and not rest[0].startswith("-"):
        return Program((found, *flags), rest[0], None, tuple(rest[1:]), Path(found).name)
    raise NotPython(f"{argv[0]} is not followed by a script or a module")


def _interpreter_of(script: Path, env: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The interpreter and the process's name."""
    try:
        with script.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise NotPython(f"{script} cannot be read: {error.strerror or error}") from error
    first, _, rest = head.partition("\n")
    words = named = first[2:].split() if first.startswith("#!") else []
    if words and Path(words[0]).name == "env" and len(words) == 2:
        words = [shutil.which(words[1], path=env.get("PATH")) or ""]
    if words and words[0].endswith("/sh") and (wrapped := _EXEC.match(rest)):
        words = [wrapped["path"]]
    if not words or not _PYTHON.fullmatch(Path(words[0]).name) or not all(map(_FLAG.fullmatch, words[1:])):
        raise NotPython(f"{script} is not a Python script")
    # With `env` or a shell the interpreter was the last to be run.
    return tuple(words), script.name if words is named else Path(words[0]).name
