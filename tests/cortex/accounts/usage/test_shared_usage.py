"""Usage and limits of several cortexes on one PostgreSQL are exact, although a cortex is killed or the database is away
for a while.

`USAGE_TEST_REQUESTS=10000 pytest …` runs the full size.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import tomli_w
from aiohttp import web

from tests.cortex.accounts.usage.counting import (
    KEYS,
    LOST_SECS,
    MODEL,
    MOST_TOKENS,
    REQUESTS,
    Clients,
    CountingEngine,
    Tokens,
)
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until
from tests.postgresql import PostgresServer

BUDGET = 1500
MODELS: list[dict[str, Any]] = [{"id": MODEL, "limit": {"context": 4 * MOST_TOKENS}}]


def written_keys(directory: Path, keys: list[dict[str, Any]]) -> dict[str, Any]:
    (directory / "keys.toml").write_text(tomli_w.dumps({"keys": keys}), encoding="utf-8")
    return {"file": str(directory / "keys.toml")}


async def recorded(url: str) -> dict[str, asyncpg.Record]:
    """The usage in the database, by request."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT * FROM usage")
    finally:
        await connection.close()
    found = {row["request_id"]: row for row in rows}
    assert len(found) == len(rows), "a request has two records"
    return found


async def until_recorded(url: str, requests: Collection[str]) -> dict[str, asyncpg.Record]:
    """The usage in the database as soon as it has these requests. The test's time-out is the deadline."""
    while True:
        found = await recorded(url)
        if found.keys() >= set(requests):
            return found
        await asyncio.sleep(0.1)


def tokens_of(row: asyncpg.Record) -> Tokens:
    return Tokens(row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"])


@pytest.fixture
def engine(benjy: V1Neuron) -> CountingEngine:
    engine = CountingEngine()
    benjy.engine.answer = engine.answer
    benjy.models = {MODEL: "loaded"}
    return engine


@pytest.mark.timeout(150 + REQUESTS / 20)
async def test_two_cortexes_share_exact_usage_and_budgets_although_one_is_killed(
    tmp_path: Path, benjy: V1Neuron, engine: CountingEngine, new_postgresql: Callable[[], str]
) -> None:
    """Every fourth key has a budget that its requests exceed. Only requests of the killed cortex that were in flight,
    or had ended less than a second before, have no record."""
    database = new_postgresql()
    keys = [{**key, "budget": f"{BUDGET}tokens/7d"} if number % 4 == 0 else key for number, key in enumerate(KEYS)]
    directories = [tmp_path / "one", tmp_path / "two"]
    for directory in directories:
        directory.mkdir()
    settings: list[dict[str, Any]] = [
        {"database": database, "state_dir": "state", "keys": written_keys(directory, keys)} for directory in directories
    ]
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(cortex_process(directories[0], [benjy], MODELS, **settings[0]))
        two = await stack.enter_async_context(cortex_process(directories[1], [benjy], MODELS, **settings[1]))
        clients = Clients([one.url, two.url])
        await until_recorded(database, await clients.ask(REQUESTS * 3 // 10))
        asking = asyncio.create_task(clients.ask(REQUESTS * 4 // 10))
        wanted = len(engine.served) + REQUESTS // 10
        await until(lambda: len(engine.served) >= wanted or asking.done(), secs=60.0)
        killed_at = time.time()
        two.process.kill()
        await two.process.wait()
        around_the_kill = await asking
        again = await stack.enter_async_context(cortex_process(directories[1], [benjy], MODELS, **settings[1]))
        clients.urls[1] = again.url
        await clients.ask(REQUESTS * 3 // 10)
        perhaps_lost = {
            number
            for number in around_the_kill
            if clients.cortex_of(number) == 1 and clients.answered.get(number, killed_at) >= killed_at - LOST_SECS
        }
        found = await until_recorded(database, clients.answered.keys() - perhaps_lost)
    complete = {number: tokens_of(row) for number, row in found.items() if row["complete"] and row["status"] == 200}
    assert complete == {number: engine.served[number] for number in complete}
    missing = engine.served.keys() - complete.keys()
    assert missing | clients.lost <= perhaps_lost
    used: Counter[str] = Counter()
    for number, tokens in engine.served.items():
        used[f"key{int(number.removeprefix('request-')) % len(KEYS)}"] += tokens.prompt + tokens.completion
    assert all(used[f"key{number}"] <= BUDGET for number in range(0, len(KEYS), 4)), used
    assert clients.refused
    print(f"{len(clients.lost)} requests were lost with the cortex, {len(missing)} have no record")


class HeldEngine(CountingEngine):
    """Keeps requests named `held` until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = asyncio.Event()
        self.released = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if b'"held"' in await request.read():
            self.holds.set()
            await self.released.wait()
        return await super().answer(request)


@pytest.mark.timeout(150)
async def test_requests_go_on_while_postgresql_is_stopped_and_are_recorded_later(
    tmp_path: Path, benjy: V1Neuron, own_postgresql_server: PostgresServer
) -> None:
    """Those with limits get 503 until it runs again. One that ended meanwhile no longer counts as running then."""
    server, engine = own_postgresql_server, HeldEngine()
    benjy.engine.answer = engine.answer
    benjy.models = {MODEL: "loaded"}
    keys: list[dict[str, Any]] = [
        {"name": "free", "key": "secret-free"},
        {"name": "limited", "key": "secret-limited", "parallel": 1},
    ]
    statuses: dict[str, int] = {}
    settings: dict[str, Any] = {"database": server.url(), "state_dir": "state", "keys": written_keys(tmp_path, keys)}
    async with (
        cortex_process(tmp_path, [benjy], MODELS, workers=2, **settings) as cortex,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):

        async def ask(key: str, number: str) -> int:
            body = {"model": MODEL, "user": number, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
            headers = {"Authorization": f"Bearer secret-{key}", "X-Request-Id": number}
            async with http.post(f"{cortex.url}/v1/chat/completions", json=body, headers=headers) as response:
                answer = await response.json()
            if response.status == 503:
                assert answer["error"]["code"] == "database_unavailable"
            statuses[number] = response.status
            return response.status

        async def ask_freely(when: str) -> None:
            assert set(await asyncio.gather(*(ask("free", f"{when}-{number}") for number in range(50)))) == {200}

        await ask_freely("before")
        assert await ask("limited", "limited-before") == 200
        await until_recorded(server.url(), statuses)
        held = asyncio.create_task(ask("limited", "held"))
        await engine.holds.wait()
        assert await ask("limited", "limited-beside") == 429
        await ask_freely("just-before")  # not all of them are in the database yet
        server.stop()
        await ask_freely("while-stopped")
        assert await ask("limited", "limited-while-stopped") == 503
        engine.released.set()
        assert await held == 200
        server.start()
        await ask_freely("after")
        attempts = itertools.count()
        while await ask("limited", f"limited-after-{next(attempts)}") != 200:
            pass
        found = await until_recorded(server.url(), statuses)
    assert {number: row["status"] for number, row in found.items()} == statuses
    served = {number: tokens_of(row) for number, row in found.items() if row["status"] == 200}
    assert served == engine.served
