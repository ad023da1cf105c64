"""Drains and held models of several cortexes on one PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from cortex.accounts.database.database import open_database
from cortex.accounts.database.source import DatabaseError, database_source
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from cortex.control.wiring import Parts, running_control
from cortex.fleet.members import decisions
from cortex.fleet.store import StateFile
from cortex.routing.replica import ANY_NODE
from shared.errors import Unavailable
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.postgresql import PostgresServer


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "LOOK_SECS", 0.02)


@contextlib.asynccontextmanager
async def cortex(url: str, benjy: V1Neuron, state: Path) -> AsyncIterator[Parts]:
    """One that uses this database."""
    config = CortexConfig.model_validate({"neurons": [{"name": "benjy", "endpoint": benjy.url}]})
    source = database_source(url, None)
    assert source is not None
    database = await open_database(source)
    try:
        async with running_control(config, Catalogue(), state=StateFile(state), database=database) as parts:
            yield parts
    finally:
        await database.close()


async def until(parts: Parts, condition: Callable[[], bool]) -> None:
    version = parts.fleet.version
    while not condition():
        version = await parts.fleet.changed_since(version)


async def test_what_one_cortex_is_told_holds_for_all(
    new_postgresql: Callable[[], str], benjy: V1Neuron, tmp_path: Path
) -> None:
    """Also for one that starts later, and until another one ends it."""
    url, later = new_postgresql(), time.time() + 3600
    async with cortex(url, benjy, tmp_path / "a") as a, cortex(url, benjy, tmp_path / "b") as b:
        await a.decisions.set_drained("benjy", True)
        assert a.fleet.node("benjy").draining
        await b.fleet.until("benjy", lambda node: node.draining)
        await b.decisions.hold_back(("m", ANY_NODE), later)
        await b.decisions.hold_back(("m", "benjy"), later)
        await until(a, lambda: len(a.state.holds) == 2)
        async with cortex(url, benjy, tmp_path / "c") as c:
            assert c.fleet.node("benjy").draining
            assert c.state.holds == {("m", ANY_NODE): later, ("m", "benjy"): later}
        await a.decisions.end_holds("m", "benjy")
        await until(b, lambda: not b.state.holds)
        await b.decisions.set_drained("benjy", False)
        await a.fleet.until("benjy", lambda node: not node.draining)


async def test_a_state_file_is_taken_over_once(
    new_postgresql: Callable[[], str], benjy: V1Neuron, tmp_path: Path
) -> None:
    """A cortex that begins to use a shared database brings its drains; later the database counts."""
    url, state = new_postgresql(), StateFile(tmp_path / "a")
    state.set_drained("benjy", True)
    await state.close()
    async with cortex(url, benjy, tmp_path / "a") as a, cortex(url, benjy, tmp_path / "b") as b:
        assert (a.fleet.node("benjy").draining, b.fleet.node("benjy").draining) == (True, True)
    async with cortex(url, benjy, tmp_path / "b") as b:
        await b.decisions.set_drained("benjy", False)
    async with cortex(url, benjy, tmp_path / "a") as a:
        assert not a.fleet.node("benjy").draining


async def test_another_database_gets_the_drains(
    new_postgresql: Callable[[], str], postgresql_server: PostgresServer, benjy: V1Neuron, tmp_path: Path
) -> None:
    """A new one, and a backup from before the drain; what was resumed since then stays resumed. Also from a state file
    of an earlier version."""
    file, first = tmp_path / "state.json", new_postgresql()
    file.write_text(json.dumps({"version": 1, "drained": ["benjy", "gone"], "decisions_shared": True}))
    async with cortex(first, benjy, tmp_path) as a:
        assert a.fleet.node("benjy").draining
        await a.decisions.set_drained("benjy", False)
        await a.decisions.set_drained("gone", False)
    name = first.partition("@/")[2].partition("?")[0]
    await asyncio.to_thread(postgresql_server.execute, f"CREATE DATABASE {name}_backup TEMPLATE {name}")
    async with cortex(first, benjy, tmp_path) as a:
        await a.decisions.set_drained("benjy", True)
        await a.decisions.look()
    async with cortex(postgresql_server.url(f"{name}_backup"), benjy, tmp_path) as a:
        assert a.decisions.drained == {"benjy"}
    async with cortex(new_postgresql(), benjy, tmp_path) as a:
        assert a.decisions.drained == {"benjy"}
        async with cortex(first, benjy, tmp_path / "b") as b:
            assert b.fleet.node("benjy").draining


async def test_a_load_does_not_wait_for_a_database_that_hangs(
    new_postgresql: Callable[[], str], benjy: V1Neuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at all if nothing holds the model back there, else not for long; the hold ends once the database answers."""
    monkeypatch.setattr(decisions, "END_HOLDS_SECS", 0.05)
    url = new_postgresql()
    async with cortex(url, benjy, tmp_path) as a:
        await a.decisions.hold_back(("m", "benjy"), time.time() + 3600)
        other = await asyncpg.connect(url)
        try:
            async with other.transaction():
                await other.execute("LOCK TABLE held_models")
                for model, node in (("other", None), ("m", "beast")):
                    with pytest.raises(StopIteration):  # it ends without waiting for anything
                        a.decisions.end_holds(model, node).send(None)
                with pytest.raises(Unavailable, match="m is still held back: no answer from PostgreSQL in"):
                    await a.decisions.end_holds("m", None)
                assert a.state.holds
        finally:
            await other.close()
        await until(a, lambda: not a.state.holds)


async def test_without_the_database_nothing_changes(
    new_postgresql: Callable[[], str],
    postgresql_server: PostgresServer,
    benjy: V1Neuron,
    tmp_path: Path,
) -> None:
    """The operator is told, and what holds goes on holding; a load of a model that nothing holds back needs none."""
    url = new_postgresql()
    name = url.partition("@/")[2].partition("?")[0]

    async def execute(statement: str) -> None:
        """In a thread: it waits for the transactions of this loop."""
        await asyncio.to_thread(postgresql_server.execute, statement, database=name)

    async with cortex(url, benjy, tmp_path) as a:
        await a.decisions.hold_back(("m", ANY_NODE), time.time() + 3600)
        for table in ("drained_nodes", "held_models"):
            await execute(f"ALTER TABLE {table} RENAME TO {table}_away")
        with pytest.raises(Unavailable, match=r"benjy was not drained: .*repeat the command once"):
            await a.decisions.set_drained("benjy", True)
        with pytest.raises(Unavailable, match="m is still held back"):
            await a.decisions.end_holds("m", None)
        await a.decisions.end_holds("other", None)
        assert not a.fleet.node("benjy").draining
        assert list(a.state.holds) == [("m", ANY_NODE)]
        with pytest.raises(DatabaseError):
            await a.decisions.look()
        for table in ("drained_nodes", "held_models"):
            await execute(f"ALTER TABLE {table}_away RENAME TO {table}")
        await a.decisions.end_holds("m", None)
        await a.decisions.set_drained("benjy", True)
        assert (a.state.holds, a.fleet.node("benjy").draining) == ({}, True)
