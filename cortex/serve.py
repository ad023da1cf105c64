"""`cortex serve` and `cortex check`."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from pydantic import BaseModel

from cortex.app import assembled, build_app, build_metrics_app
from cortex.catalogue import Catalogue, load_catalogue
from cortex.config import CortexConfig, parse_listen
from shared.serve import ListenError, Site, bind, serve_until_stopped
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


async def serve(
    config: CortexConfig, catalogue: Catalogue, *, sock: socket.socket | None = None, lifeline: int | None = None
) -> None:
    """Serves until told to stop. `sock` is an already bound socket to use instead of `gateway.listen`.

    Raises:
        ListenError: an address is taken.
    """
    gateway = sock or bind(*parse_listen(config.gateway.listen))
    try:
        metrics = bind(*parse_listen(config.gateway.metrics_listen))
    except ListenError:
        gateway.close()
        raise
    async with assembled(config, catalogue) as parts:
        sites = [Site(build_app(parts), gateway), Site(build_metrics_app(parts), metrics)]
        host, port = gateway.getsockname()[:2]

        def ready() -> None:
            log.info("cortex listening on http://%s:%d, %d neurons", host, port, len(config.neurons))

        await serve_until_stopped(
            sites,
            drain_timeout_secs=config.gateway.drain_timeout_secs,
            lifeline=lifeline,
            on_ready=ready,
        )
