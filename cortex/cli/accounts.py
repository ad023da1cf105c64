"""Opens the database and the keys that a configuration names, for `cortex serve` and for `cortex keys --config`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from cortex.accounts.database.source import DatabaseSource, database_source
from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.keys.key_terms import KeyTerms, key_object
from cortex.accounts.keys.provisioned import keys_in_environment, keys_in_file
from cortex.accounts.keys.unmatched_globs import unmatched_globs
from cortex.config.files import KEYS_VARIABLE, read_configuration, state_directory
from cortex.config.settings import CortexConfig
from shared.protocol import first_problem
from shared.settings import SettingsError
from shared.system.files import is_writable

if TYPE_CHECKING:
    from cortex.accounts.database.database import Database


class OpenAccounts(NamedTuple):
    """`database` is None for a cortex that keeps nothing."""

    database: Database | None
    keys: KeyRing


@contextlib.asynccontextmanager
async def opened_accounts(
    config: CortexConfig, config_file: Path, state_directory: Path | None
) -> AsyncIterator[OpenAccounts]:
    """The database and the keys, read. Takes CORTEX_KEYS out of the environment.

    Raises:
        DatabaseError: the database cannot be used. It may have keys, so cortex must not serve without it.
        SettingsError: there is a wrong key in the file or the environment.
    """
    async with _opened_database(database_source(config.database, state_directory)) as database:
        if database is None:
            keys = KeyRing(currency=config.usage.currency)
        else:
            from cortex.accounts.keys.key_store import KeyStore

            keys = KeyRing(KeyStore(database), currency=config.usage.currency)
        os.environ.pop(KEYS_VARIABLE, None)  # the processes that cortex starts get none of the keys
        await keys.load(config.keys_path(config_file))
        yield OpenAccounts(database, keys)


@contextlib.asynccontextmanager
async def _opened_database(source: DatabaseSource | None) -> AsyncIterator[Database | None]:
    """None if there is none and none can be created."""
    if source is None or (source.path is not None and not source.path.exists() and not is_writable(source.path.parent)):
        yield None
        return
    from cortex.accounts.database.database import open_database

    database = await open_database(source)
    try:
        yield database
    finally:
        await database.close()


def key_problems(config: CortexConfig, config_file: Path) -> list[str]:
    """What is wrong with the keys in the file and the environment, and with the file of `[auth.oidc]`. Blocks."""
    file, currency, problems = config.keys_path(config_file), config.usage.currency, []
    reads: list[Callable[[], object]] = [partial(keys_in_environment, os.environ, currency), config.auth.oidc.secret]
    reads += [] if file is None else [partial(keys_in_file, file, currency)]
    for read in reads:
        try:
            read()
        except SettingsError as error:
            problems += error.problems
    return problems


def act_on_keys(config_file: Path, action: str, body: Mapping[str, Any]) -> Any:
    """What `/keys` of a running cortex would answer: for `create` with this body, `list`, `revoke` or `rotate` with its
    `name`.

    Raises:
        SettingsError, DatabaseError: the configuration or the database cannot be used.
        ServiceError: the keys cannot be changed so.
        ValueError: a field of the body is wrong.
    """
    return asyncio.run(_act_on_keys(config_file, action, body))


async def _act_on_keys(config_file: Path, action: str, body: Mapping[str, Any]) -> Any:
    config, catalogue = read_configuration(config_file)
    async with opened_accounts(config, config_file, state_directory(config, config_file)) as (database, keys):
        shown = {"database": str(database)}
        if action == "list":
            return {"keys": [key_object(key) for key in keys.keys]}
        if action == "revoke":
            await keys.revoke(body["name"])
            return {"name": body["name"], "revoked": True, **shown}
        if action == "rotate":
            key, secret = await keys.rotate(body["name"])
            return {**key_object(key), "key": secret, **shown}
        terms = _terms(body)
        key, secret = await keys.create(terms)
        return {**key_object(key), "key": secret, "warnings": unmatched_globs(terms, catalogue), **shown}


def _terms(body: Mapping[str, Any]) -> KeyTerms:
    try:
        return KeyTerms.model_validate(body)
    except ValidationError as error:
        raise ValueError(": ".join(first_problem(error))) from error
