"""Brings the tables of a database up to date. Imports Alembic only if there is something to do: it takes a while."""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect, text

HEAD = "0006"
"""The last migration."""
_MIGRATIONS = Path(__file__).parent / "migrations"


class NewerDatabase(Exception):
    """A newer cortex has changed the tables; its migration is the argument."""


def version_of(connection: Connection) -> str | None:
    """The last migration that the database has had; None for an empty one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def migrate(connection: Connection) -> None:
    """Runs the migrations that the database lacks, in the connection's transaction.

    Raises:
        NewerDatabase: this version of cortex does not know the database's last migration.
    """
    version = version_of(connection)
    if version == HEAD:
        return
    if version is not None and version > HEAD:
        raise NewerDatabase(version)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # importing it logs each of its plugins
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")
