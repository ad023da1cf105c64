"""The keys in force, as their sources change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cortex.accounts.database.database import open_database
from cortex.accounts.database.source import database_source
from cortex.accounts.keys import key_ring
from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.keys.key_store import KeyStore
from cortex.accounts.keys.key_terms import KeyTerms
from cortex.accounts.limits.terms import KeyLimits, Limits
from shared.errors import ServiceError
from shared.tasks import cancel_all
from tests.postgresql import PostgresServer


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(key_ring, "LOOK_SECS", 0.01)
    monkeypatch.setattr(key_ring, "STEADY_SECS", 0.01)
    return tmp_path / "keys.toml"


def write(file: Path, terms: str = "") -> None:
    file.write_text(f'[[keys]]\nname = "alice"\nkey = "sk-alice"\n{terms}\n', encoding="utf-8")


def clear(file: Path) -> None:
    file.write_text("# none\n", encoding="utf-8")


async def test_new_limits_of_a_key_in_a_file_are_announced(file: Path) -> None:
    """Nothing else of the key changes, so workers learn nothing new, but the limiter does."""
    write(file, "rpm = 60")
    keys, changed = KeyRing(environ={}), asyncio.Event()
    await keys.load(file)
    keys.changes.subscribe(changed.set)
    loop = asyncio.create_task(keys.file_loop())
    write(file, "rpm = 6")
    await changed.wait()
    assert keys.limits == {"file:alice": KeyLimits(Limits(rpm=6))}
    await cancel_all([loop])


async def test_keys_of_a_file_end_when_the_configuration_names_it_no_more(file: Path) -> None:
    write(file)
    keys, changed = KeyRing(environ={}), asyncio.Event()
    await keys.load(file)
    assert keys.table.find(b"sk-alice") is not None
    keys.changes.subscribe(changed.set)
    loop = asyncio.create_task(keys.file_loop())
    keys.configure(None, "EUR")
    await changed.wait()
    assert keys.table.find(b"sk-alice") is None
    assert keys.caller("file:alice") is None
    await cancel_all([loop])


async def test_revoking_the_last_key_opens_nothing(tmp_path: Path) -> None:
    """Else its holder would be an administrator on this host. The same after a restart."""
    source = database_source(None, tmp_path)
    assert source is not None
    database = await open_database(source)
    keys = KeyRing(KeyStore(database), environ={})
    await keys.load(None)
    assert keys.table.empty
    await keys.create(KeyTerms(name="alice"))
    changed = asyncio.Event()
    keys.changes.subscribe(changed.set)
    await keys.revoke("alice")
    assert changed.is_set()
    assert keys.keys == []
    assert not keys.table.empty
    restarted = KeyRing(KeyStore(database), environ={})
    await restarted.load(None)
    assert not restarted.table.empty
    await database.close()


async def test_keys_in_a_postgresql_that_is_gone(
    new_postgresql: Callable[[], str], postgresql_server: PostgresServer
) -> None:
    """What cannot be changed stays, and the advice is about PostgreSQL, not about a disk."""
    url = new_postgresql()
    source = database_source(url, None)
    assert source is not None
    database = await open_database(source)
    keys = KeyRing(KeyStore(database), environ={})
    await keys.load(None)
    await keys.create(KeyTerms(name="alice"))
    await asyncio.to_thread(postgresql_server.execute, f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")
    for change in (keys.create(KeyTerms(name="bob")), keys.rotate("alice"), keys.revoke("alice")):
        with pytest.raises(ServiceError, match="make sure that PostgreSQL runs") as refused:
            await change
        assert "disk" not in refused.value.message
    assert [key.name for key in keys.keys] == ["alice"]
    await database.close()


async def test_a_file_without_keys_opens_nothing(file: Path) -> None:
    """The last one is removed from it while cortex runs."""
    write(file)
    keys, changed = KeyRing(environ={}), asyncio.Event()
    await keys.load(file)
    keys.changes.subscribe(changed.set)
    loop = asyncio.create_task(keys.file_loop())
    clear(file)
    await changed.wait()
    assert keys.keys == []
    assert not keys.table.empty
    await cancel_all([loop])
