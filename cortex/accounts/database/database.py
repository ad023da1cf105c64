"""Opens the database: SQLite in a file, or PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiosqlite
import sqlalchemy.exc
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cortex.accounts.database.migrate import HEAD, NewerDatabase, migrate, version_of
from cortex.accounts.database.source import ConstraintViolated, DatabaseError, DatabaseSource
from shared.tasks import cancel_all, timeout

CONNECT_SECS = 5.0
COMMAND_SECS = 30.0
BUSY_SECS = 10.0
"""How long SQLite waits for another process that writes."""
INTERRUPT_SECS = 0.2
_FAILURES = (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError, asyncio.TimeoutError)
"""What a command raises that fails."""
_UNWRITABLE = ("readonly database", "unable to open database file")
"""What SQLite says if it may not write the file or beside it."""
_REMEDIES = {
    "not a database": "restore a copy of it, or move it away and create the keys again",
    "malformed": "restore a copy of it, or move it away and create the keys again",
    "disk I/O error": "is the disk full or damaged?",
    "disk is full": "free some space there",
}
"""What to do about what SQLite says of its file."""
_MIGRATION_LOCK = 0x636F7274  # any number, the same in every cortex


class Database:
    """An open database with all tables. Use it from one event loop. `read_only`: SQLite's file cannot be written.

    Every failure raises DatabaseError, including that of a command inside a transaction.
    """

    def __init__(self, engine: AsyncEngine, source: DatabaseSource, *, read_only: bool = False) -> None:
        self._engine = engine
        self._writing = engine.execution_options(writing=True)
        self.source = source
        self.read_only = read_only
        self._number_lock = asyncio.Lock()
        self._number_connection: aiosqlite.Connection | None = None

    @property
    def is_postgresql(self) -> bool:
        """Several cortexes may use it."""
        return self.source.path is None

    @property
    def remedy(self) -> str:
        """What to do when it cannot be written."""
        if self.is_postgresql:
            return "make sure that PostgreSQL runs, that cortex can reach it and that it accepts changes"
        return "make sure that cortex can write there (is the disk full or read-only?)"

    def __str__(self) -> str:
        return self.source.shown

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that only reads."""
        return self._transaction(self._engine)

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that writes; committed at the end of the body, undone by an exception. SQLite has one at a
        time, over all processes."""
        if self.read_only:
            raise DatabaseError(
                f"{self} cannot be written (a running cortex notices a change of that when it restarts)"
            )
        return self._transaction(self._writing)

    @contextlib.asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        with self._described():
            async with engine.begin() as connection:
                yield connection

    @contextlib.contextmanager
    def _described(self) -> Iterator[None]:
        """Turns what a command raises that fails into DatabaseError."""
        try:
            yield
        except sqlalchemy.exc.IntegrityError as error:
            raise ConstraintViolated(f"{self}: {_reason(error)}") from error
        except _FAILURES as error:
            raise DatabaseError(f"{self}: {_reason(error)}") from error

    async def number(self, query: str) -> int:
        """The number that a query finds. From SQLite it takes a tenth of the work of a transaction: for what is asked
        all the time."""
        if self.source.path is None or self.read_only:
            async with self.reading() as connection:
                return int((await connection.execute(text(query))).scalar_one())
        async with self._number_lock:
            try:
                with self._described():
                    if self._number_connection is None:
                        self._number_connection = await _connect_to(self.source.path)
                    ((found,),) = await self._number_connection.execute_fetchall(query)
            except BaseException:
                await self._close_number_connection()
                raise
            return int(found)

    @contextlib.asynccontextmanager
    async def stopping_after(self, secs: float, connection: AsyncConnection) -> AsyncIterator[None]:
        """A command in the body that runs after this time fails, in the database too. The time is that of the whole
        body."""
        if self.is_postgresql:
            # For each command; the other one is for all, and has the driver cancel the command that runs.
            await connection.execute(text(f"SET LOCAL statement_timeout = {int(secs * 1000)}"))
            async with timeout(secs):
                yield
            return
        driver: Any = (await connection.get_raw_connection()).driver_connection

        async def interrupt() -> None:
            await asyncio.sleep(secs)
            while True:  # the next command too
                await driver.interrupt()
                await asyncio.sleep(INTERRUPT_SECS)

        interrupting = asyncio.create_task(interrupt(), name="interrupt")
        try:
            yield
        finally:
            await cancel_all([interrupting])

    async def close(self) -> None:
        """Closes every connection."""
        await self._engine.dispose()
        async with self._number_lock:
            await self._close_number_connection()

    async def _close_number_connection(self) -> None:
        connection, self._number_connection = self._number_connection, None
        if connection is not None:
            await connection.close()


async def open_database(source: DatabaseSource) -> Database:
    """The database, created and migrated if necessary. Two cortexes may do that at once.

    Raises:
        DatabaseError: it cannot be opened.
    """
    if source.path is None:
        return await _opened(Database(_postgresql(source.url), source))
    try:
        await asyncio.to_thread(_create, source.path)
        return await _opened(Database(_sqlite(URL.create("sqlite+aiosqlite", database=str(source.path))), source))
    except OSError as error:
        if not source.path.exists():
            raise DatabaseError(f"{source.shown} cannot be created: {error.strerror}") from error
    except DatabaseError as error:
        if not any(sign in str(error) for sign in _UNWRITABLE):
            raise
    return await _opened(Database(_sqlite(_read_only(source.path)), source, read_only=True))


def _connect_to(path: Path) -> aiosqlite.Connection:
    file = f"{path.absolute().as_uri()}?mode=rw"
    return aiosqlite.connect(file, uri=True, isolation_level=None, timeout=BUSY_SECS)


def _read_only(path: Path) -> URL:
    """Without a log beside it, which a killed process leaves behind, SQLite could not read the file in a directory
    where it cannot make one, unless told that the file does not change."""
    query = {"mode": "ro", "uri": "true"}
    if not path.with_name(f"{path.name}-wal").exists():
        query["immutable"] = "1"
    return URL.create("sqlite+aiosqlite", database=path.as_uri(), query=query)


def _create(path: Path) -> None:
    """Others must not read names and usage, so the file is this user's alone from the start."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.geteuid() == 0 and os.fstat(fd).st_size == 0:
            # Made by root for a cortex of another user, whose directory this is.
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    finally:
        os.close(fd)


async def _opened(database: Database) -> Database:
    """Migrates the database. Closes it again if that fails."""
    try:
        async with database.reading() as connection:
            version = await connection.run_sync(version_of)
        if version != HEAD:
            if database.read_only:
                raise DatabaseError(f"{database} was made by another version of cortex and cannot be written")
            async with database.writing() as connection:
                if database.is_postgresql:
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
                await connection.run_sync(migrate)
    except BaseException as error:
        await database.close()
        if isinstance(error, NewerDatabase):
            message = f"{database} was made by a newer cortex (migration {error}): update this one"
            raise DatabaseError(message) from error
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in str(error)), None)
        if isinstance(error, DatabaseError) and remedy is not None:
            raise DatabaseError(f"{error}; {remedy}") from error
        raise
    return database


def _reason(error: Exception) -> str:
    """What a failed command says, without its statement and parameters."""
    original = getattr(error, "orig", None) or error
    return str(original).partition("\n")[0] or type(original).__name__


def _postgresql(url: str) -> AsyncEngine:
    import asyncpg

    async def connect() -> Any:
        try:
            # asyncpg reads the URL itself: it knows libpq's parameters, which SQLAlchemy's dialect does not.
            return await asyncpg.connect(url, timeout=CONNECT_SECS, command_timeout=COMMAND_SECS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # SQLAlchemy passes them on as they are
            raise ConnectionError(str(error)) from error
        except ValueError as error:  # its message may have a part of the password
            raise ConnectionError("cannot read the URL: check its host, port and parameters") from error
        except asyncio.TimeoutError as error:
            raise ConnectionError(f"no connection after {CONNECT_SECS:g} s") from error

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, pool_pre_ping=True)


def _sqlite(url: URL) -> AsyncEngine:
    # Without an isolation level the driver leaves transactions to `_begin`.
    engine = create_async_engine(url, connect_args={"isolation_level": None, "timeout": BUSY_SECS})
    event.listen(engine.sync_engine, "connect", _set_up_sqlite)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A transaction that begins by reading fails if another process writes before it does.
    writes = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


async def tables_of(source: DatabaseSource) -> str | None:
    """The last migration of a database that exists, which is not changed; None for an empty one.

    Raises:
        DatabaseError: it cannot be read.
    """
    engine = _postgresql(source.url) if source.path is None else _sqlite(_read_only(source.path))
    database = Database(engine, source, read_only=source.path is not None)
    try:
        async with database.reading() as connection:
            return await connection.run_sync(version_of)
    finally:
        await database.close()
