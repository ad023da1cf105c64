"""`cortex serve` and `cortex check`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cortex.accounts.database.source import DatabaseError, database_source
from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.storage import marked_as_running
from cortex.accounts.usage.journal_file import USAGE_DIRECTORY
from cortex.accounts.usage.recorder_process import RecorderProcess
from cortex.app import (
    build_control_app,
    build_metrics_app,
    control_address,
    control_socket,
    serving_here,
)
from cortex.cli.accounts import key_problems, opened_accounts
from cortex.cli.listening import client_sockets, give_up_sockets, metrics_socket
from cortex.config.catalogue import Catalogue
from cortex.config.files import (
    ConfigurationFiles,
    catalogue_problems,
    configuration_warnings,
    read_configuration,
    state_directory,
    tls_warnings,
)
from cortex.config.settings import CortexConfig
from cortex.control.reload import Reloader, warn_of_absent
from cortex.control.wiring import Parts, running_control
from cortex.fleet.members.dialled.broker_process import open_broker
from cortex.fleet.store import StateFile
from cortex.upstream.address import Address
from cortex.workers.supervisor import Supervisor
from shared.logs import configure_logging
from shared.serve import ListenError, Site, reaches_network, run, serving, settle, told_to_stop
from shared.settings import SettingsError
from shared.system.files import is_writable
from shared.system.service_manager import notify_ready
from shared.tasks import running
from shared.terminal.command_line import fail
from shared.terminal.wording import counted

if TYPE_CHECKING:
    from cortex.accounts.database.database import Database  # it needs SQLAlchemy, which starts slowly

log = logging.getLogger(__name__)

_OPEN_TO_NETWORK = (
    "{listen} can be reached from the network, and there is no API key: create one with `{directory}cortex keys create "
    "NAME --admin --config {file}`, or set [gateway] allow_anonymous = true to let everyone use the models"
)


def run_serve(
    config_file: Path, *, workers: int | None, fd: int | None, lifeline: int | None, remove_state: bool = False
) -> int:
    """Serves until told to stop; the exit status, EX_CONFIG after a mistake in the files. `workers` overrides the file,
    `fd` is a bound socket to listen on, and closing the other end of the pipe `lifeline` stops the service.
    `remove_state`: nothing is kept after that."""
    try:
        files = ConfigurationFiles(config_file, workers=workers)
        config, catalogue = files.read()
        configure_logging(config.log_level, config.log_format)
        for warning in (
            *configuration_warnings(config, catalogue, config_file),
            *catalogue_problems(catalogue, config.models_path(config_file)),
            *tls_warnings(config, config_file),
        ):
            log.warning("%s", warning)
        config.auth.oidc.secret()  # fails now if its file cannot be read, not at the first sign-in
        if problems := config.discovery.problems():  # likewise
            raise SettingsError(problems)
        for inherited in (fd, lifeline):
            if inherited is not None:  # a worker that inherited them would keep the port open
                os.set_inheritable(inherited, False)
        sock = None if fd is None else socket.socket(fileno=fd)
        with marked_as_running(state_directory(config, config_file)):
            run(serve(config, catalogue, files, sock=sock, lifeline=lifeline))
        if remove_state and (directory := state_directory(config, config_file)) is not None:
            shutil.rmtree(directory, ignore_errors=True)
    except SettingsError as error:
        fail("cortex", error, status=os.EX_CONFIG)  # no restart mends it: RestartPreventExitStatus= of cortex.service
    except (ListenError, DatabaseError, OSError) as error:
        fail("cortex", error)
    return 0


def run_check(config_file: Path, *, as_json: bool = False) -> int:
    """Prints the problems of the files, or how many neurons and models they have; the exit status."""
    warnings: list[str] = []
    try:
        config, catalogue = read_configuration(config_file)
        problems = catalogue_problems(catalogue, config.models_path(config_file))
        problems += [*key_problems(config, config_file), *config.discovery.problems()]
        warnings += configuration_warnings(config, catalogue, config_file)
        try:
            warnings += tls_warnings(config, config_file)
        except SettingsError as error:
            problems += error.problems
        if problems:
            raise SettingsError(problems)
    except SettingsError as error:
        if as_json:
            _print_found(error.problems, warnings)
        else:
            print(error, file=sys.stderr)
        return 1
    if as_json:
        _print_found([], warnings)
        return 0
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    neurons, models = counted(len(config.neurons), "neuron"), counted(len(catalogue.models), "model")
    if config.discovery.finds:
        neurons += f" and those that {config.discovery.kind!r} finds"
    print(f"ok: {config_file}: {neurons}; {config.models_path(config_file)}: {models}")
    return 0


def _print_found(errors: Sequence[str], warnings: Sequence[str]) -> None:
    print(json.dumps({"ok": not errors, "errors": list(errors), "warnings": list(warnings)}, indent=2))


async def serve(
    config: CortexConfig,
    catalogue: Catalogue,
    files: ConfigurationFiles,
    *,
    sock: socket.socket | None = None,
    lifeline: int | None = None,
) -> None:
    """Serves until told to stop. `files` are their source, watched for changes; `sock` is a bound socket to use
    instead of `gateway.listen`.

    Raises:
        ListenError: an address is taken.
        DatabaseError: the database cannot be used.
        SettingsError: a key is wrong, or there is none and the network can reach cortex.
    """
    settings = config.gateway
    socks = client_sockets(settings, sock)
    metrics = metrics_socket(settings, socks)
    workers: Supervisor | None = None

    def kill_workers() -> None:
        if workers is not None:
            workers.kill()

    url = settings.url(*socks[0].getsockname()[:2])
    reload_asked, restarting = asyncio.Event(), asyncio.Event()
    directory = _state_directory(config, files)
    state = StateFile(directory)
    async with (
        told_to_stop(
            lifeline=lifeline,
            grace_secs=settings.drain_timeout_secs,
            on_hangup=reload_asked.set,
            on_restart=restarting.set,
            on_forced_exit=kill_workers,
        ) as stop,
        opened_accounts(config, files.path, directory) as (database, keys),
        _controlling(config, catalogue, files, state=state, database=database, keys=keys) as parts,
    ):
        _check_keys(socks[0], config, keys, files.path)
        warn_of_absent(state, parts.fleet, config)
        usage, recorder = _recording(parts, directory)
        control = control_socket()
        reloader = reloader_of(parts, files, reload_asked)
        sites = [Site(build_control_app(parts, reloader), control), Site(build_metrics_app(parts), metrics)]
        async with serving(sites, drain_timeout_secs=settings.drain_timeout_secs) as closing:
            if settings.workers == 1:
                front: AbstractAsyncContextManager[object] = serving_here(
                    parts, socks, control_address(control), usage_directory=usage
                )
            else:
                workers = _supervisor(parts, socks, control_address(control), usage)
                front = workers.running(stop)
            settle()
            async with recorder, front, running({"configuration": reloader.watch_loop}):
                await _until_stopped(stop, restarting, url, len(parts.membership.clients))
                closing.set()  # first: event streams are requests in flight, too


@asynccontextmanager
async def _controlling(
    config: CortexConfig,
    catalogue: Catalogue,
    files: ConfigurationFiles,
    *,
    state: StateFile,
    database: Database | None,
    keys: KeyRing,
) -> AsyncIterator[Parts]:
    """The control, and the broker that it may need. Raises ListenError."""
    broker, paths = open_broker(config), [str(path) for path in files.paths]
    async with (
        nullcontext() if broker is None else broker.running(),
        running_control(
            config, catalogue, files=paths, state=state, database=database, keys=keys, broker=broker
        ) as parts,
    ):
        yield parts


async def _until_stopped(stop: asyncio.Event, restarting: asyncio.Event, url: str, neurons: int) -> None:
    """From here on cortex serves. When it is told to stop for good, systemd closes its copies of the sockets, too."""
    log.info("cortex listening on %s, %s", url, counted(neurons, "neuron"))
    notify_ready()
    await stop.wait()
    if not restarting.is_set():
        give_up_sockets()


def _check_keys(sock: socket.socket, config: CortexConfig, keys: KeyRing, file: Path) -> None:
    """Warns of budgets in another currency. Raises SettingsError if strangers could use cortex without a key, and the
    operator has not allowed it."""
    for problem in keys.foreign_budgets(config.usage.currency):
        log.warning("%s", problem)
    closed = bool(keys.keys) or config.auth.oidc.on
    if not closed and not config.gateway.allow_anonymous and reaches_network(sock):
        host, port = sock.getsockname()[:2]
        given = os.environ.get("STATE_DIRECTORY")  # systemd's, which a shell does not have
        directory = f"STATE_DIRECTORY={given} " if given and config.state_dir is None and not config.database else ""
        raise SettingsError([_OPEN_TO_NETWORK.format(listen=f"{host}:{port}", file=file, directory=directory)])


def _recording(parts: Parts, directory: Path | None) -> tuple[Path | None, AbstractAsyncContextManager[None]]:
    """Where workers leave usage, None for nowhere, and what moves it into the database while it runs."""
    source = database_source(parts.config.database, directory)
    if directory is None or source is None:
        return None, nullcontext()
    usage = directory / USAGE_DIRECTORY  # also if it cannot be written now: that may change
    return usage, RecorderProcess(parts.live, source, usage, parts.storage.recorder_says).running()


def _supervisor(parts: Parts, socks: Sequence[socket.socket], address: Address, usage: Path | None) -> Supervisor:
    return Supervisor(
        socks,
        address,
        live=parts.live,
        resolver=parts.resolver,
        routes=parts.routes,
        counts=parts.counts,
        fleet=parts.fleet,
        shutdown=parts.shutdown,
        keys=parts.keys,
        people=parts.sign_in,
        usage_directory=usage,
        requests=parts.requests,
        broker=parts.broker_address,
    )


def reloader_of(parts: Parts, files: ConfigurationFiles, asked: asyncio.Event) -> Reloader:
    """Applies changes of these files to a running control. `asked`: as of Reloader."""
    return Reloader(
        files,
        asked,
        live=parts.live,
        fleet=parts.fleet,
        membership=parts.membership,
        routes=parts.routes,
        state=parts.state,
        foreign_budgets=parts.keys.foreign_budgets,
        also_wrong=partial(_wrong_beside, files.path),
    )


def _wrong_beside(config_file: Path, config: CortexConfig) -> list[str]:
    """What is wrong with the files of keys, certificates and the registration token. Blocks."""
    problems = [*key_problems(config, config_file), *config.discovery.problems()]
    try:
        return [*problems, *tls_warnings(config, config_file)]
    except SettingsError as error:
        return [*problems, *error.problems]


def _state_directory(config: CortexConfig, files: ConfigurationFiles) -> Path | None:
    """As `state_directory`, with a warning if nothing can be kept there."""
    directory = state_directory(config, files.path)
    if directory is None and files.path.resolve().is_file():
        log.warning(
            "no state is kept (keys, usage, drained neurons, models held back, load times): this user has no home "
            "directory; set state_dir in cortex.toml"
        )
    if directory is not None and not is_writable(directory):
        log.warning(
            "no state can be kept in %s, which cannot be written: usage is lost when cortex ends, and keys cannot be "
            "made or revoked there; give cortex's user the right to write there, or set another state_dir in "
            "cortex.toml, and restart cortex",
            directory,
        )
    return directory
