"""The `neuron` command."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron.api.app_keys import SERVICES
from neuron.api.estimate_command import add_parser, run_estimate
from neuron.app import build_app
from neuron.config import NeuronConfig
from neuron.engine.state_dir import StateDirError
from neuron.gpu.discovery import run_discover
from neuron.gpu.simulated import resolve_devices
from neuron.harness.checks import CheckedConfig, spec_of
from shared.errors import InvalidRequest, ServiceError
from shared.logs import configure_logging
from shared.serve import ListenError, Site, bind, serve_until_stopped
from shared.settings import SettingsError, load_settings
from shared.version import version_text

log = logging.getLogger("neuron")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuron", description="The agent on a GPU host: runs engines for a cortex.")
    parser.add_argument("--version", action="version", version=version_text("neuron"))
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve this host's GPUs")
    serve.add_argument("--config", type=Path, help="neuron.toml; without it defaults and NEURON_* variables apply")
    serve.add_argument("--fd", type=int, help="listen on this inherited socket, which is bound already")
    serve.add_argument(
        "--lifeline-fd", type=int, help="stop when this inherited pipe ends: its other end is a parent's"
    )
    discover = commands.add_parser("discover", help="print this host's GPU topology")
    discover.add_argument("--json", action="store_true", help="as JSON, as GET /discovery answers")
    discover.add_argument("--config", type=Path, help="neuron.toml, for [simulate]")
    add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 when it cannot be done, 2 when it is not understood."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "discover":
            config = None if arguments.config is None else _config(arguments.config)
            return run_discover(config, arguments.json)
        if arguments.command == "estimate":
            return run_estimate(None if arguments.config is None else _config(arguments.config), arguments)
        config = _config(arguments.config)
        configure_logging(config.log_level, config.log_format)
        asyncio.run(_serve(config, arguments.fd, arguments.lifeline_fd))
    except (SettingsError, ListenError, StateDirError, ServiceError) as error:
        print(f"neuron: {error}", file=sys.stderr)
        return 1
    return 0


def _config(path: Path | None) -> NeuronConfig:
    config = load_settings(CheckedConfig, path, env_prefix="NEURON_")
    problems: list[str] = []
    for number, command in enumerate(config.default_commands):
        try:
            spec_of(command, harnesses=config.harness_names)
        except InvalidRequest as error:
            problems.append(f"default_models[{number}].{error.message}")
    if config.simulate is not None:
        try:
            resolve_devices(config.simulate, host=config.name or "")
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError([f"{path or 'configuration'}: {problem}" for problem in problems])
    return config


async def _serve(config: NeuronConfig, fd: int | None, lifeline: int | None) -> None:
    site = _site(config, fd)
    name = config.name or socket.gethostname()
    host = f"[{config.host}]" if ":" in config.host else config.host

    def kill_engines() -> None:
        if SERVICES in site.app:
            site.app[SERVICES].workers.kill_all_now()

    await serve_until_stopped(
        [site],
        drain_timeout_secs=config.drain_timeout_secs,
        lifeline=lifeline,
        on_ready=lambda: log.info("neuron %s listening on http://%s:%d", name, host, site.port),
        on_forced_exit=kill_engines,
    )


def _site(config: NeuronConfig, fd: int | None) -> Site:
    if fd is None:
        sock = bind(config.host, config.port)
    else:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise ListenError(f"--fd {fd} is not a socket: {error.strerror}") from error
        sock.setblocking(False)
    return Site(build_app(config, port=int(sock.getsockname()[1])), sock)


if __name__ == "__main__":
    sys.exit(main())
