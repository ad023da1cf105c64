"""Which database a configuration names. Pure. Imports no driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

NAME = "cortex.db"


class DatabaseError(Exception):
    """The database cannot be used. The message names it, without its password, and says what to do."""


class ConstraintViolated(DatabaseError):
    """A row cannot be stored, because a value that must be unique is taken."""


@dataclass(frozen=True)
class DatabaseSource:
    """Where a database is. `path` is SQLite's file, None for PostgreSQL; `url` is PostgreSQL's, else empty. `shown` is
    for messages: it has no password."""

    path: Path | None
    url: str
    shown: str


def database_source(url: str | None, directory: Path | None) -> DatabaseSource | None:
    """The database at `url`, PostgreSQL's; without one SQLite's in the state directory. None if there is neither."""
    if url is not None:
        parts = urlsplit(url)
        address = parts.netloc.rpartition("@")[2]
        shown = f"{parts.username}@{address}" if parts.username else address
        return DatabaseSource(None, url, f"postgresql://{shown}{parts.path}")
    if directory is None:
        return None
    path = directory / NAME
    return DatabaseSource(path, "", str(path))
