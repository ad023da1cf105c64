"""The common part of the `cortex` and `neuron` command lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from shared import __version__, request_ids


class CommandGroup(TyperGroup):
    """Commands return their exit status. Ctrl-C exits with 130, a closed output pipe with 1, both without a message."""

    def invoke(self, ctx: Any) -> int:
        try:
            status = int(super().invoke(ctx) or 0)
            sys.stdout.flush()  # here rather than at interpreter exit, so that a closed pipe is handled below
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        raise typer.Exit(status)


def version_text(program: str) -> str:
    """What `--version` prints: program, version and build, such as `cortex 0.1.0 (compiled)`. Either all of the request
    path is compiled or none is (deploy/compile.py)."""
    build = "pure Python" if request_ids.__file__.endswith(".py") else "compiled"
    return f"{program} {__version__} ({build})"


def _print_version(ctx: typer.Context, asked: bool) -> None:
    if asked:
        print(version_text(str(ctx.find_root().info_name)))
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of a command line itself, before its command."""


def command_line(description: str) -> typer.Typer:
    """An application with `--version` and no commands. Its help is plain text and its failures plain tracebacks."""
    app = typer.Typer(
        cls=CommandGroup,
        help=description,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    return app


def run_command(app: typer.Typer, program: str, argv: Sequence[str] | None) -> int:
    """Runs the command that `argv` names (default: the process's arguments).

    Returns:
        The exit status; 2 when the arguments are wrong.
    """
    try:
        app(None if argv is None else list(argv), prog_name=program)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def fail(program: str, error: object, *, status: int = 1) -> NoReturn:
    """Ends the command with this status and `program: error` on standard error."""
    print(f"{program}: {error}", file=sys.stderr)
    raise typer.Exit(status)
