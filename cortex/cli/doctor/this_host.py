"""What can be checked without asking others: the files, the state directory, the database, the ports."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from cortex.accounts.database.source import DatabaseError, DatabaseSource, database_source
from cortex.accounts.storage import advice_for, try_writing
from cortex.cli.accounts import key_problems
from cortex.cli.doctor.findings import Finding, fault, ok, warning
from cortex.config.catalogue import Catalogue
from cortex.config.files import (
    catalogue_problems,
    configuration_warnings,
    read_configuration,
    state_directory,
    tls_warnings,
)
from cortex.config.gateway import parse_listen
from cortex.config.settings import CortexConfig
from shared.serve import ListenError, bind
from shared.settings import SettingsError

LOW_DISK_BYTES: Final = 1 << 30
_ANY: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not listened on
"""Where to reach what listens on all addresses."""
_LISTEN_ADVICE: Final = {
    errno.EADDRINUSE: "end the program that uses it, or ",
    errno.EACCES: "let this user use ports below 1024 (systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE), or ",
}


class DeploymentFiles(NamedTuple):
    """What the files say. `path`: of cortex.toml."""

    path: Path
    config: CortexConfig
    catalogue: Catalogue


def check_files(path: Path) -> tuple[DeploymentFiles | None, list[Finding]]:
    """The configuration, None if cortex would not start with it. Blocks."""
    try:
        config, catalogue = read_configuration(path)
    except SettingsError as error:
        return None, [fault("configuration", problem, _advice(problem)) for problem in error.problems]
    files, models = DeploymentFiles(path, config, catalogue), config.models_path(path)
    found = [fault("configuration", each) for each in [*key_problems(config, path), *config.discovery.problems()]]
    try:
        warnings = tls_warnings(config, path)
    except SettingsError as error:
        warnings = []
        found += [fault("configuration", each) for each in error.problems]
    warnings += [*configuration_warnings(config, catalogue, path), *catalogue_problems(catalogue, models)]
    found += [warning("configuration", each) for each in warnings]
    neurons, count = len(config.neurons), len(catalogue.models)
    return files, [*found, ok("configuration", f"{path} and {models} can be read: neurons {neurons}, models {count}")]


def _advice(problem: str) -> str:
    if "environment variable" in problem:
        return "run doctor with the environment of the service (systemd: EnvironmentFile=)"
    return ""


def check_state(files: DeploymentFiles) -> Finding:
    """Writes a file into the state directory and removes it. Blocks."""
    directory, subject = state_directory(files.config, files.path), "state directory"
    if directory is None:
        return warning(subject, "nothing is kept: this user has no home directory", "set state_dir in cortex.toml")
    place = next(each for each in (directory, *directory.parents) if os.path.lexists(each))
    try:
        try_writing(place, durable=True)
        free = shutil.disk_usage(place).free
    except OSError as error:
        return fault(subject, f"{directory} cannot be written: {error.strerror}", advice_for(error))
    text = f"{directory} can be written, {free / 2**30:.1f} GiB are free"
    return ok(subject, text) if free >= LOW_DISK_BYTES else warning(subject, text, "make room there")


async def check_database(files: DeploymentFiles) -> Finding:
    """Reads the database without changing it."""
    source = database_source(files.config.database, state_directory(files.config, files.path))
    if source is None:
        return warning("database", "none: no keys and no usage are kept", "set state_dir or database in cortex.toml")
    if source.path is not None and not source.path.exists():
        return ok("database", f"{source.shown} is made when cortex starts")
    return await _check_tables(source)


async def _check_tables(source: DatabaseSource) -> Finding:
    from cortex.accounts.database.database import tables_of
    from cortex.accounts.database.migrate import HEAD

    try:
        version = await tables_of(source)
    except DatabaseError as error:
        advice = "is it running, and are its address and password right?" if source.path is None else ""
        return fault("database", str(error), advice)
    if version is None:
        return ok("database", f"{source.shown} is empty; its tables are made when cortex starts")
    if version > HEAD:
        return fault("database", f"{source.shown} was made by a newer cortex", "update this one")
    if version != HEAD:
        return warning(
            "database", f"{source.shown} has tables of an older cortex", "they are updated at the next start"
        )
    return ok("database", f"{source.shown} can be read")


def check_port(files: DeploymentFiles, key: str) -> Finding:
    """Whether `[gateway] key` can be listened on. Only if no cortex runs there. Blocks."""
    address = str(getattr(files.config.gateway, key))
    try:
        bind(*parse_listen(address)).close()
    except ListenError as error:
        code = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        return fault(key, str(error), f"{_LISTEN_ADVICE.get(code or 0, '')}change [gateway] {key}")
    return ok(key, f"{address} is free")


def listen_url(config: CortexConfig) -> str:
    """Where a cortex with this configuration answers on this host."""
    host, port = parse_listen(config.gateway.listen)
    if host in _ANY:
        host = _ANY[host]
    return config.gateway.url(f"[{host}]" if ":" in host else host, port)
