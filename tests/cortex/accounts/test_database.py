"""The database, opened as cortex opens it: SQLite in a file, and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select, text

from cortex.accounts.database import migrate
from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.source import ConstraintViolated, DatabaseError, DatabaseSource, database_source
from cortex.accounts.database.tables import LIMIT_STATES, METADATA

OTHER_UID = 65534


@pytest.fixture(params=["sqlite", "postgresql"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseSource:
    """An empty database of each kind."""
    url = request.getfixturevalue("new_postgresql")() if request.param == "postgresql" else None
    found = database_source(url, tmp_path / "state")
    assert found is not None
    return found


@contextlib.asynccontextmanager
async def opened(source: DatabaseSource) -> AsyncIterator[Database]:
    database = await open_database(source)
    try:
        yield database
    finally:
        await database.close()


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA))


async def test_migrations_make_the_tables(source: DatabaseSource) -> None:
    """The migrations result in the tables that the code uses, also if several processes run them at once."""
    async with contextlib.AsyncExitStack() as stack:
        databases = await asyncio.gather(*(stack.enter_async_context(opened(source)) for _ in range(4)))
        async with databases[0].reading() as connection:
            assert await connection.run_sync(differences) == []
            assert await connection.run_sync(migrate.version_of) == migrate.HEAD


def test_head_is_the_last_migration() -> None:
    """A forgotten HEAD would leave a migration out."""
    directory = Path(migrate.__file__).parent / "migrations"
    assert ScriptDirectory(str(directory)).get_heads() == [migrate.HEAD]


def test_the_log_is_about_cortex(tmp_path: Path) -> None:
    """Alembic logs each of its plugins when it is imported, and each migration."""
    code = (
        "import asyncio, logging, sys; from pathlib import Path\n"
        "from cortex.accounts.database.database import open_database\n"
        "from cortex.accounts.database.source import database_source\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "async def main(): await (await open_database(database_source(None, Path(sys.argv[1])))).close()\n"
        "asyncio.run(main())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "alembic" not in ran.stderr


async def test_writers_take_turns(source: DatabaseSource) -> None:
    """Transactions that read and then write lose nothing: on SQLite they take turns."""

    async def add(database: Database) -> None:
        async with database.writing() as connection:
            held = "" if not database.is_postgresql else " FOR UPDATE"
            found = await connection.execute(text(f"SELECT updated_at FROM limit_states{held}"))
            await connection.execute(LIMIT_STATES.update().values(updated_at=found.scalar_one() + 1))

    async with opened(source) as one, opened(source) as other:
        async with one.writing() as connection:
            await connection.execute(LIMIT_STATES.insert().values(scope="key:a", state={}, updated_at=0))
        await asyncio.gather(*(add(database) for database in (one, other) for _ in range(10)))
        async with one.reading() as connection:
            assert (await connection.execute(select(LIMIT_STATES.c.updated_at))).scalar_one() == 20


async def test_what_fails_in_a_transaction_is_a_database_error(source: DatabaseSource) -> None:
    """Callers catch one error, which names the database; also if a command is not answered in time."""
    row = {"scope": "key:a", "state": {}, "updated_at": 0.0}
    async with opened(source) as database:
        with pytest.raises(DatabaseError, match="no_such_table"):
            async with database.reading() as connection:
                await connection.execute(text("SELECT * FROM no_such_table"))
        with pytest.raises(DatabaseError, match="no_such_table"):
            await database.number("SELECT count(*) FROM no_such_table")
        with pytest.raises(DatabaseError, match=re.escape(str(database))):
            async with database.writing() as connection:
                raise asyncio.TimeoutError
        with pytest.raises(ConstraintViolated):
            async with database.writing() as connection:
                await connection.execute(LIMIT_STATES.insert(), [row, row])
        assert await database.number("SELECT count(*) FROM limit_states") == 0


async def test_a_newer_database_is_refused(source: DatabaseSource) -> None:
    """An old cortex does not write to tables that it does not know."""
    async with opened(source) as database, database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=r"made by a newer cortex \(migration 9999\)"):
        await open_database(source)


async def test_the_file_is_private(tmp_path: Path) -> None:
    """Other users of the host cannot read names and usage."""
    source = database_source(None, tmp_path / "state")
    assert source is not None
    assert source.path is not None
    async with opened(source):
        modes = {path.name: path.stat().st_mode & 0o777 for path in source.path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert source.path.parent.stat().st_mode & 0o777 == 0o700


async def test_unusable_directory_is_named(tmp_path: Path) -> None:
    """The error says which file cannot be created."""
    (tmp_path / "state").write_text("a file")
    source = database_source(None, tmp_path / "state")
    assert source is not None
    with pytest.raises(DatabaseError, match=r"state/cortex\.db cannot be created"):
        await open_database(source)


async def test_damaged_file(tmp_path: Path) -> None:
    """Damage is an error: the file may have held keys."""
    (tmp_path / "cortex.db").write_bytes(bytes(range(256)) * 100)
    source = database_source(None, tmp_path)
    assert source is not None
    with pytest.raises(DatabaseError, match="file is not a database; restore a copy of it, or move it away"):
        await open_database(source)


async def test_file_damaged_within(tmp_path: Path) -> None:
    """The error names what to do here too."""
    source = database_source(None, tmp_path)
    assert source is not None
    async with opened(source):
        pass
    file = tmp_path / "cortex.db"
    file.write_bytes(file.read_bytes()[:100] + b"\xff" * 8000)
    with pytest.raises(DatabaseError, match="malformed; restore a copy of it, or move it away"):
        await open_database(source)


@contextlib.contextmanager
def without_write_permission(directory: Path) -> Iterator[None]:
    """Inside the body this process may read the directory, but not write it."""
    for path in directory.iterdir():
        path.chmod(0o444)
    directory.chmod(0o555)
    own = os.geteuid()
    if own == 0:  # root may write everything
        os.seteuid(OTHER_UID)
    try:
        yield
    finally:
        os.seteuid(own)
        directory.chmod(0o755)


@pytest.mark.parametrize("left_log", [False, True], ids=["closed", "killed"])
async def test_read_only_file(left_log: bool) -> None:
    """A database that cannot be written can be read: the keys in it stay valid."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's directories are for one user only
        source = database_source(None, Path(name))
        assert source is not None
        assert source.path is not None
        async with opened(source) as database, database.writing() as connection:
            await connection.execute(LIMIT_STATES.insert().values(scope="key:a", state={}, updated_at=0))
        with contextlib.closing(sqlite3.connect(source.path)) as other:
            if left_log:
                other.execute("SELECT * FROM limit_states")
            assert source.path.with_name("cortex.db-wal").exists() == left_log
            with without_write_permission(Path(name)):
                async with opened(source) as database:
                    assert database.read_only
                    async with database.reading() as connection:
                        assert (await connection.execute(select(LIMIT_STATES.c.scope))).scalars().all() == ["key:a"]
                    with pytest.raises(DatabaseError, match="cannot be written"):
                        database.writing()


async def test_unreachable_server_is_named_without_its_password(tmp_path: Path) -> None:
    """The log does not get the password."""
    source = database_source(f"postgresql://me:secret@/db?host={tmp_path}", None)
    assert source is not None
    with pytest.raises(DatabaseError) as caught:
        await open_database(source)
    assert "postgresql://me@/db" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1:pass", "one,two:pass"])
async def test_a_url_that_the_driver_cannot_read(host: str) -> None:
    """It raises an error of its own, with what it cannot read. Only cortex.toml's check comes before it."""
    source = database_source(f"postgresql://me:secret@{host}/db", None)
    assert source is not None
    with pytest.raises(DatabaseError, match="cannot read the URL: check its host, port and parameters") as caught:
        await open_database(source)
    assert "secret" not in str(caught.value)


def test_without_state_directory_there_is_none() -> None:
    """`cortex dev` keeps nothing."""
    assert database_source(None, None) is None
