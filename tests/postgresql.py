"""PostgreSQL for tests: Debian's package, started on a Unix socket in a directory of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.processes import eventually

START_SECS = 30.0
_USER = "postgres"
"""Of the server and of the database. PostgreSQL does not run as root."""

_OTHER_UID = 65534
"""Without a user of that name."""


@dataclass
class PostgresServer:
    """A running server. `directory` has its socket."""

    directory: Path
    process: subprocess.Popen[bytes]

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, for `database` in cortex.toml."""
        return f"postgresql://{_USER}@/{database}?host={self.directory}"

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Runs one statement."""

        async def run() -> None:
            connection = await asyncpg.connect(self.url(database))
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as thread:  # the caller may be in a running event loop
            thread.submit(asyncio.run, run()).result()

    def stop(self) -> None:
        """Ends its sessions too."""
        self.process.send_signal(signal.SIGINT)  # SIGTERM waits for the sessions
        self.process.wait()

    def start(self) -> None:
        """After `stop`, with the same data. Returns as soon as it accepts connections."""
        self.process = _started(self.directory)
        eventually(lambda: _answers(self), "PostgreSQL accepts connections", within_secs=START_SECS)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresServer]:
    """A server for all tests of this run. It is not stopped in between."""
    with _running_server() as server:
        yield server


@pytest.fixture
def own_postgresql_server() -> Iterator[PostgresServer]:
    """A server for one test, which may stop it and start it again."""
    with _running_server() as server:
        yield server


@pytest.fixture(scope="session")
def new_postgresql(postgresql_server: PostgresServer) -> Callable[[], str]:
    """Each call creates an empty database and returns its URL."""
    numbers = itertools.count()

    def create() -> str:
        name = f"test{next(numbers)}"
        postgresql_server.execute(f"CREATE DATABASE {name}")
        return postgresql_server.url(name)

    return create


@contextmanager
def _running_server() -> Iterator[PostgresServer]:
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has a limit
    user = _server_user()
    try:
        if user is not None:
            os.chown(directory, user.pw_uid, user.pw_gid)
        options = ("--username", _USER, "--auth", "trust", "--no-sync", "--locale", "C")
        subprocess.run(
            [_binary("initdb"), "--pgdata", directory / "data", *options],
            check=True,
            capture_output=True,
            cwd=directory,
            **_as_user(),
        )
        server = PostgresServer(directory, _started(directory))
        try:
            eventually(lambda: _answers(server), "PostgreSQL accepts connections", within_secs=START_SECS)
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()
    finally:
        shutil.rmtree(directory)


def _started(directory: Path) -> subprocess.Popen[bytes]:
    settings = {"listen_addresses": "", "unix_socket_directories": str(directory), "fsync": "off"}
    return subprocess.Popen(
        [_binary("postgres"), "-D", directory / "data", *(f"--{name}={value}" for name, value in settings.items())],
        stderr=subprocess.DEVNULL,
        cwd=directory,
        **_as_user(),
    )


def _as_user() -> dict[str, Any]:
    """Arguments of a process of the server's user."""
    user = _server_user()
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _server_user() -> pwd.struct_passwd | None:
    """None for the user of the tests."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        return pwd.getpwuid(_OTHER_UID)


def _binary(name: str) -> Path:
    """Debian keeps the server's programs out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    on_path = shutil.which(name)
    if not found and on_path is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql)")
    return found[-1] if found else Path(on_path or name)


def _answers(server: PostgresServer) -> bool:
    assert server.process.poll() is None, "PostgreSQL has ended"
    try:
        server.execute("SELECT 1")
    except (OSError, asyncpg.PostgresError):
        return False
    return True
