"""What the commands of `neuron` do: serve, check, discover and estimate."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from neuron.api.app_keys import SERVICES
from neuron.app import build_app
from neuron.config import DEFAULT_HARNESS, NeuronConfig
from neuron.engine.state_dir import StateDirError
from neuron.estimate.estimator import estimate_of
from neuron.estimate.options import with_options
from neuron.estimate.reply import reply_of
from neuron.estimate.reply import table_of as estimate_table
from neuron.gpu.discovery import discovery_of, topology_source
from neuron.gpu.discovery_table import table_of as discovery_table
from neuron.gpu.simulated import resolve_devices
from neuron.harness.checks import CheckedConfig, spec_of
from neuron.harness.registry import harness_of
from neuron.lifecycle.group_network import link_mbps
from neuron.memory.host import HostTopologySource, with_host_ram
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest, ServiceError
from shared.logs import configure_logging
from shared.protocol import Discovery, EstimateReply
from shared.serve import ListenError, Site, bind, reaches_network, serve_until_stopped
from shared.settings import SettingsError, load_settings
from shared.system.service_manager import notify_ready
from shared.terminal.command_line import fail
from shared.tls import RenewedContext, TlsError, certificate_warning, server_context

log = logging.getLogger("neuron")


def run_serve(config_file: Path | None, *, fd: int | None, lifeline: int | None) -> int:
    """Serves until stopped; returns the exit status, EX_CONFIG after a mistake in the file. `fd` is a bound socket to
    listen on; the service also stops when the pipe `lifeline` closes."""
    try:
        config = _load_config(config_file)
        configure_logging(config.log_level, config.log_format)
        warning = _tls_warning(config)
        if warning is not None:
            log.warning("%s", warning)
        for name, program in _missing_programs(config):
            log.warning("[harness.%s]: %s", name, _missing(program))
        asyncio.run(_serve(config, fd, lifeline))
    except (SettingsError, TlsError) as error:
        fail("neuron", error, status=os.EX_CONFIG)  # no restart mends it: RestartPreventExitStatus= of neuron.service
    except (ListenError, StateDirError, ServiceError) as error:
        fail("neuron", error)
    return 0


def run_check(config_file: Path) -> int:
    """Prints the problems of a neuron.toml, or what it configures; the exit status. An engine that is not installed is
    no problem of the file, which may be checked elsewhere."""
    try:
        config = _load_config(config_file)
        with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as sock:
            problem = _open_to_network(sock, config) if _bound_to(sock, config.host) else None
        if problem is not None:
            raise SettingsError([f"{config_file}: host = {config.host!r}: {problem}"])
        warning = _tls_warning(config)
    except (SettingsError, TlsError) as error:
        print(error, file=sys.stderr)
        return 1
    harnesses = ", ".join(config.harness_names) or "no harness"
    models = f"{len(config.default_models)} default model{'' if len(config.default_models) == 1 else 's'}"
    if warning is not None:
        print(f"warning: {config_file}: {warning}", file=sys.stderr)
    for name, program in _missing_programs(config):
        print(f"warning: {config_file}: [harness.{name}]: {_missing(program)}", file=sys.stderr)
    print(f"ok: {config_file}: {config.host}:{config.port}; {harnesses}; {models}")
    return 0


def _tls_warning(config: NeuronConfig) -> str | None:
    """What is wrong with the certificate's dates. Raises TlsError."""
    return None if config.tls_files is None else certificate_warning(config.tls_files)


def _missing_programs(config: NeuronConfig) -> Iterator[tuple[str, str]]:
    """Each harness whose engines cannot be started here because their executable does not exist, with its name."""
    for name in config.harness_names:
        settings = config.harness_settings(name)
        program = harness_of(name, config).program(settings)
        if program and shutil.which(program[0], path={**os.environ, **settings.env}.get("PATH")) is None:
            yield name, program[0]


def _missing(program: str) -> str:
    return f"this host has no executable {program!r}, so no engine starts here"


def run_discover(config_file: Path | None, *, as_json: bool) -> int:
    """Prints this host's GPUs. Returns the exit status: 0, also without a usable GPU. Without a file it asks NVML."""
    try:
        discovery = asyncio.run(_discover(_config_or_default(config_file)))
    except (SettingsError, ServiceError) as error:
        fail("neuron", error)
    sys.stdout.write(discovery.model_dump_json(indent=2) + "\n" if as_json else discovery_table(discovery))
    return 0


def run_estimate(config_file: Path | None, model: str, options: Mapping[str, str], *, as_json: bool) -> int:
    """Prints the memory that a model needs. Returns the exit status: 0, also when it does not fit on this host. Without
    a file it uses this host's GPUs and the engine's defaults."""
    try:
        reply = asyncio.run(_estimate(_config_or_default(config_file), model, options))
    except (SettingsError, ServiceError) as error:
        fail("neuron", error)
    sys.stdout.write(reply.model_dump_json(indent=2) + "\n" if as_json else estimate_table(reply))
    return 0


def _config_or_default(path: Path | None) -> NeuronConfig:
    return NeuronConfig() if path is None else _load_config(path)


def _load_config(path: Path | None) -> NeuronConfig:
    loaded = load_settings(CheckedConfig, path, env_prefix="NEURON_")
    config = _with_absolute_paths(loaded, Path() if path is None else path.parent.absolute())
    problems: list[str] = []
    for number, command in enumerate(config.default_commands):
        try:
            spec_of(command, config)
        except InvalidRequest as error:
            problems.append(f"default_models[{number}].{error.message}")
    if config.simulate is not None:
        try:
            resolve_devices(config.simulate, host=config.name or "")
        except SettingsError as error:
            problems += error.problems
    if config.tls_files is not None:
        try:
            server_context(config.tls_files)
            _tls_warning(config)
        except TlsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError([f"{path or 'configuration'}: {problem}" for problem in problems])
    return config


def _with_absolute_paths(config: NeuronConfig, directory: Path) -> NeuronConfig:
    """The TLS files and those of `[cortex]` are relative to neuron.toml."""
    given = {name: getattr(config.cortex, name) for name in ("token_file", "ca")}
    cortex = config.cortex.model_copy(
        update={name: directory / path for name, path in given.items() if path is not None}
    )
    paths = {name: getattr(config, name) for name in ("tls_cert", "tls_key", "tls_client_ca")}
    found = {name: directory / path for name, path in paths.items() if path is not None}
    return config.model_copy(update={**found, "cortex": cortex})


async def _serve(config: NeuronConfig, fd: int | None, lifeline: int | None) -> None:
    site = _site(config, fd)
    name = config.name or socket.gethostname()
    host = f"[{config.host}]" if ":" in config.host else config.host
    scheme = "http" if site.tls is None else "https"

    def kill_engines() -> None:
        if SERVICES in site.app:
            site.app[SERVICES].registry.kill_all_now()

    def on_ready() -> None:
        log.info("neuron %s listening on %s://%s:%d", name, scheme, host, site.port)
        notify_ready()

    await serve_until_stopped(
        [site],
        drain_timeout_secs=config.drain_timeout_secs,
        lifeline=lifeline,
        on_ready=on_ready,
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
    problem = _open_to_network(sock, config)
    if problem is not None:
        sock.close()
        raise SettingsError([problem])
    files = config.tls_files
    tls = None if files is None else RenewedContext(files, server_context)
    return Site(build_app(config, port=int(sock.getsockname()[1])), sock, tls)


def _bound_to(sock: socket.socket, host: str) -> bool:
    """Binds to any port of `host`. False if this machine does not have that address, as when its file is checked
    elsewhere."""
    try:
        sock.bind((host, 0))
    except (OSError, TypeError):  # TypeError: a name that cannot be in DNS
        return False
    return True


def _open_to_network(sock: socket.socket, config: NeuronConfig) -> str | None:
    """Why neuron does not listen on this bound socket; None if it does."""
    if not reaches_network(sock) or config.bearer_token is not None or config.allow_anonymous:
        return None
    return (
        f"refusing to listen on {sock.getsockname()[0]} without a token: anyone who can reach the port could run code"
        " on this host. Set token_env (or token) in neuron.toml, or allow_anonymous = true if that is what you want"
    )


def _source(config: NeuronConfig) -> HostTopologySource:
    vram_dir = config.state_directory(config.port) / "vram"
    return with_host_ram(topology_source(config, vram_dir), config, vram_dir)


async def _discover(config: NeuronConfig) -> Discovery:
    source = _source(config)
    try:
        mbps = await asyncio.to_thread(link_mbps, config.group, config.host)
        return await discovery_of(config, source, instance_id=None, network_mbps=mbps)
    finally:
        await source.close()


async def _estimate(config: NeuronConfig, name: str, options: Mapping[str, str]) -> EstimateReply:
    estimator = harness_of(DEFAULT_HARNESS, config).estimator
    if estimator is None:
        raise InvalidRequest(f"harness {DEFAULT_HARNESS!r} cannot estimate memory")
    settings = config.harness_settings(DEFAULT_HARNESS)
    spec = EngineSpec(model_id=name, harness=DEFAULT_HARNESS, source=name, args=tuple(settings.extra_args))
    served = with_options(replace(estimator.options_of(spec), tensor_parallel=None), options)
    source = _source(config)
    try:
        topology = await source.discover()
    finally:
        await source.close()
    made = await estimate_of(estimator, spec, topology, {**os.environ, **settings.env}, served)
    return reply_of(name, made)
