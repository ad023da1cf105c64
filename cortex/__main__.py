"""The `cortex` command."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from cortex.cli.commands import add_client_commands
from cortex.cli.dev.command import add_dev_command
from cortex.cli.serve import serve
from cortex.cli.simulate import add_simulate_command
from cortex.config.files import ConfigurationFiles, configuration_warnings, read_configuration
from shared.logs import configure_logging
from shared.loop import run
from shared.serve import ListenError
from shared.settings import SettingsError
from shared.version import version_text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cortex", description="One address in front of a fleet of GPU hosts.")
    parser.add_argument("--version", action="version", version=version_text("cortex"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve_parser = commands.add_parser("serve", help="run the front door")
    serve_parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="cortex.toml")
    serve_parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on the one port (default: the file's)"
    )
    serve_parser.add_argument("--fd", type=int, help="an inherited, bound socket to listen on")
    serve_parser.add_argument("--lifeline-fd", type=int, help="stop when this inherited pipe ends")
    serve_parser.set_defaults(run=_serve)

    check_parser = commands.add_parser("check", help="validate cortex.toml and models.toml")
    check_parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="cortex.toml")
    check_parser.set_defaults(run=_check)

    add_dev_command(commands)
    add_simulate_command(commands)
    add_client_commands(commands)
    return parser


def _serve(args: argparse.Namespace) -> int:
    try:
        files = ConfigurationFiles(args.config, workers=args.workers)
        config, catalogue = files.read()
        configure_logging(config.log_level, config.log_format)
        for fd in (args.fd, args.lifeline_fd):
            if fd is not None:  # ours alone: a worker that held them, too, would keep the port open
                os.set_inheritable(fd, False)
        sock = None if args.fd is None else socket.socket(fileno=args.fd)
        run(serve(config, catalogue, files, sock=sock, lifeline=args.lifeline_fd))
    except (SettingsError, ListenError, OSError) as error:
        print(f"cortex: {error}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace) -> int:
    try:
        config, catalogue = read_configuration(args.config)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for warning in configuration_warnings(config, catalogue, args.config):
        print(f"warning: {warning}", file=sys.stderr)
    models, neurons = len(catalogue.models), len(config.neurons)
    print(f"ok: {args.config}: {neurons} neurons; {config.models_path(args.config)}: {models} models")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit status."""
    args = build_parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()  # here and not at the interpreter's end, so that a reader that left is noticed below
    except KeyboardInterrupt:  # while a client command waits; a load that it began goes on
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
