"""Opens the database and the keys that a configuration names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cortex.accounts.database.source import DatabaseSource, database_source
from cortex.accounts.keys.key_ring import KeyRing
from cortex.config.settings import CortexConfig
from shared.files import is_writable

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
    """Keys are loaded inside the body.

    Raises:
        DatabaseError: the database cannot be used. It may have keys, so cortex must not serve without it.
        SettingsError: there is a wrong key in the file or the environment.
    """
    async with _opened_database(database_source(config.database, state_directory)) as database:
        if database is None:
            keys = KeyRing()
        else:
            from cortex.accounts.keys.key_store import KeyStore

            keys = KeyRing(KeyStore(database))
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
