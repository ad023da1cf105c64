"""`cortex serve` and `cortex check`."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cortex.app import (
    assembled,
    build_control_app,
    build_metrics_app,
    control_address,
    control_socket,
    serving_here,
)
from cortex.catalogue import Catalogue, load_catalogue
from cortex.config import CortexConfig, GatewaySettings, parse_listen
from cortex.workers.supervisor import Supervisor
from shared.loop import settle
from shared.serve import ListenError, Site, bind, serving, told_to_stop
from shared.settings import SettingsError, load_settings

log = logging.getLogger(__name__)

ENV_PREFIX = "CORTEX_"


class _CatalogueName(BaseModel):
    """The one key of cortex.toml that leads further, whatever else stands there."""

    models_config: Path = Path("models.toml")


def read_configuration(path: Path) -> tuple[CortexConfig, Catalogue]:
    """cortex.toml with the environment's overrides, and the catalogue it names.

    Raises:
        SettingsError: with every problem of both files.
    """
    problems: list[str] = []
    config: CortexConfig | None = None
    catalogue = Catalogue()
    try:
        config = load_settings(CortexConfig, path, env_prefix=ENV_PREFIX)
        models_path: Path | None = config.models_path(path)
    except SettingsError as error:
        problems += error.problems
        models_path = _catalogue_named_in(path)
    try:
        catalogue = load_catalogue(models_path) if models_path is not None else catalogue
    except SettingsError as error:
        problems += error.problems
    if problems or config is None:
        raise SettingsError(problems)
    return config, catalogue


def _catalogue_named_in(path: Path) -> Path | None:
    """The catalogue that a cortex.toml with mistakes names, so that its mistakes are told too; None when that one
    cannot be told either."""
    named = {name: value for name, value in os.environ.items() if name == f"{ENV_PREFIX}MODELS_CONFIG"}
    try:
        return path.parent / load_settings(_CatalogueName, path, env_prefix=ENV_PREFIX, environ=named).models_config
    except SettingsError:
        return None


def configuration_warnings(config: CortexConfig, catalogue: Catalogue, path: Path) -> list[str]:
    """What is allowed and yet probably not meant."""
    names = {entry.name for entry in config.neurons}
    warnings = [] if names else [f"{path}: neurons: none is listed, nothing can be served"]
    for number, profile in enumerate(catalogue.models):
        warnings += [
            f"{config.models_path(path)}: models[{number}].pinned_on: {profile.id!r} is pinned on {name!r}, "
            f"which is no neuron of {path}"
            for name in profile.pinned_on
            if name not in names
        ]
    return warnings


def with_workers(config: CortexConfig, workers: int) -> CortexConfig:
    """The configuration with another number of workers.

    Raises:
        SettingsError: it is none.
    """
    try:
        gateway = GatewaySettings.model_validate({**config.gateway.model_dump(), "workers": workers})
    except ValidationError as error:
        raise SettingsError([f"--workers {workers}: {error.errors()[0]['msg']}"]) from error
    return config.model_copy(update={"gateway": gateway})


async def serve(
    config: CortexConfig, catalogue: Catalogue, *, sock: socket.socket | None = None, lifeline: int | None = None
) -> None:
    """Serves until told to stop. `sock` is an already bound socket to use instead of `gateway.listen`.

    Raises:
        ListenError: an address is taken.
    """
    settings = config.gateway
    socks = _listening(settings, sock)
    try:
        metrics = bind(*parse_listen(settings.metrics_listen))
    except ListenError:
        for listening in socks:
            listening.close()
        raise
    workers: Supervisor | None = None

    def kill_workers() -> None:
        if workers is not None:
            workers.kill()

    host, port = socks[0].getsockname()[:2]
    async with (
        told_to_stop(lifeline=lifeline, grace_secs=settings.drain_timeout_secs, on_forced_exit=kill_workers) as stop,
        assembled(config, catalogue) as parts,
    ):
        control = control_socket()
        sites = [Site(build_control_app(parts), control), Site(build_metrics_app(parts), metrics)]
        async with serving(sites, drain_timeout_secs=settings.drain_timeout_secs) as closing:
            if settings.workers == 1:
                front: AbstractAsyncContextManager[object] = serving_here(parts, socks, control_address(control))
            else:
                workers = Supervisor(parts, socks, control_address(control))
                front = workers.running()
            async with front:
                settle()
                log.info("cortex listening on http://%s:%d, %d neurons", host, port, len(config.neurons))
                await stop.wait()
                closing.set()  # first: event streams are requests in flight, too


def _listening(settings: GatewaySettings, sock: socket.socket | None) -> list[socket.socket]:
    """A socket for each worker, all on one port."""
    if sock is not None:
        return [sock, *(sock.dup() for _ in range(settings.workers - 1))]
    host, port = parse_listen(settings.listen)
    first = bind(host, port)
    if settings.workers == 1:
        return [first]
    # A shared port would let another cortex in unnoticed: that it is free was told by binding it alone.
    port = first.getsockname()[1]
    first.close()
    return [bind(host, port, shared=True) for _ in range(settings.workers)]
