"""Usage is exact: what many clients use through several workers is in the database as the engine counted it, although a
worker is killed meanwhile.

`USAGE_TEST_REQUESTS=10000 pytest …` runs the full size.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest
import tomli_w
from aiohttp import web

from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

MODEL = "org/small"
REQUESTS = int(os.environ.get("USAGE_TEST_REQUESTS", "1000"))
CLIENTS = 200
KEYS = [{"name": f"key{number}", "key": f"secret-{number}"} for number in range(20)]
PRICES = {"input": 1.0, "cached_input": 0.5, "output": 4.0}
PHASES = {"before": REQUESTS * 3 // 10, "kill": REQUESTS * 4 // 10, "after": REQUESTS * 3 // 10}
"""How many requests come before the kill and are recorded, around it, and after it."""
LOST_SECS = 1.0
"""A killed worker may take with it the records of requests that ended so shortly before."""


class Tokens(NamedTuple):
    """What one request used."""

    prompt: int
    cached: int
    completion: int


class CountingEngine:
    """Counts what it serves, by the number that the client gives as `user`."""

    def __init__(self) -> None:
        self.served: dict[str, Tokens] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        tokens = Tokens(random.randint(1, 500), random.randint(0, 1), random.randint(1, 100))
        self.served[body["user"]] = tokens
        usage = {
            "prompt_tokens": tokens.prompt,
            "completion_tokens": tokens.completion,
            "prompt_tokens_details": {"cached_tokens": tokens.cached},
        }
        await asyncio.sleep(random.random() / 50)
        if not body.get("stream"):
            return web.json_response({"id": "a", "object": "chat.completion", "choices": [], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events: list[dict[str, Any]] = [{"id": "a", "choices": [{"index": 0, "delta": {"content": "x"}}]}]
        if body.get("stream_options", {}).get("include_usage"):
            events.append({"id": "a", "choices": [], "usage": usage})
        for event in events:
            await response.write(b"data: %b\n\n" % json.dumps(event).encode())
        await response.write(b"data: [DONE]\n\n")
        return response


class Clients:
    """Clients with all keys, and when each request was answered, by its number."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count()
        self.answered: dict[str, float] = {}
        self.lost: set[str] = set()

    async def ask(self, count: int) -> set[str]:
        """As many requests as that. Their numbers."""
        numbers = list(itertools.islice(self._numbers, count))
        left = iter(numbers)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(self._run(http, left) for _ in range(CLIENTS)))
        return {f"request-{number}" for number in numbers}

    async def _run(self, http: aiohttp.ClientSession, left: Iterator[int]) -> None:
        for number in left:
            body: dict[str, Any] = {
                "model": MODEL,
                "user": f"request-{number}",
                "messages": [{"role": "user", "content": "x"}],
            }
            if number % 3:
                body["stream"] = True
            if number % 3 == 2:
                body["stream_options"] = {"include_usage": True}
            headers = {"Authorization": f"Bearer secret-{number % 20}", "X-Request-Id": body["user"]}
            try:
                async with http.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as response:
                    text = await response.text()
            except aiohttp.ClientError:
                self.lost.add(body["user"])
                continue
            assert response.status == 200, text
            self.answered[body["user"]] = time.time()


async def kill_a_worker(cortex: CortexProcess, clients: Clients, answered: int) -> float:
    """Once that many requests are answered. When it was."""
    await until(lambda: len(clients.answered) >= answered, secs=60.0)
    children = psutil.Process(cortex.process.pid).children()
    worker = next(child for child in children if "cortex.workers" in child.cmdline())
    killed_at = time.time()
    worker.kill()
    return killed_at


def recorded(database: Path) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(
            "SELECT request_id, key, prompt_tokens, cached_tokens, completion_tokens, cost, status, complete FROM usage"
        ).fetchall()


@pytest.mark.timeout(60 + REQUESTS / 20)
async def test_usage_is_what_the_engine_counted(tmp_path: Path, benjy: V1Neuron) -> None:
    """Requests of a killed worker that were in flight, or had ended less than a second before, have no record; all
    others have one, with the engine's own counts."""
    engine = CountingEngine()
    benjy.engine.answer = engine.answer
    benjy.models = {MODEL: "loaded"}
    database = tmp_path / "state" / "cortex.db"
    (tmp_path / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    keys, models = {"file": str(tmp_path / "keys.toml")}, [{"id": MODEL, "prices": PRICES}]
    async with cortex_process(tmp_path, [benjy], models, workers=4, state_dir="state", keys=keys) as cortex:
        clients = Clients(cortex.url)
        await clients.ask(PHASES["before"])
        await until(lambda: len(recorded(database)) == PHASES["before"], secs=60.0)
        killing = asyncio.create_task(kill_a_worker(cortex, clients, PHASES["before"] + PHASES["kill"] // 3))
        around_the_kill = await clients.ask(PHASES["kill"])
        killed_at = await killing
        await clients.ask(PHASES["after"])
        cortex.process.send_signal(signal.SIGTERM)
        assert await cortex.ended(secs=30.0) == 0
    rows = recorded(database)
    found = {row[0]: Tokens(*row[2:5]) for row in rows if row[7]}
    assert len({row[0] for row in rows}) == len(rows)
    assert found == {number: engine.served[number] for number in found}
    missing = engine.served.keys() - found.keys()
    assert clients.lost | missing <= around_the_kill
    for number in missing - clients.lost:
        assert killed_at - LOST_SECS <= clients.answered[number] <= killed_at + LOST_SECS
    print(f"{len(clients.lost)} requests were lost with the worker, {len(missing)} have no record")
    for number, key, prompt, cached, completion, cost, status, complete in rows:
        assert key == f"key{int(number.removeprefix('request-')) % 20}"
        if complete:
            assert status == 200
            assert cost == pytest.approx(((prompt - cached) * 1.0 + cached * 0.5 + completion * 4.0) / 1e6)
