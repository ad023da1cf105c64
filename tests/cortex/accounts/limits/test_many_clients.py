"""Many clients at once with keys whose limits are tight, through several workers and several cortexes: the engine sees
no more than the limits allow, and every request gets its answer.

`LIMIT_TEST_REQUESTS=10000 pytest …` runs the full size.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tomli_w
from aiohttp import web

from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL, LIMITED = "org/small", "org/limited"
REQUESTS = int(os.environ.get("LIMIT_TEST_REQUESTS", "800"))
CLIENTS = 200
KEYS: list[dict[str, Any]] = [
    {"name": f"key{number}", "key": f"secret-{number}", **limits}
    for number in range(20)
    for limits in [
        ({"rpm": 12}, {"tpm": 3000}, {"parallel": 2}, {"budget": "4000tokens/7d"}, {"rpm": 30, "parallel": 1})[
            number % 5
        ]
    ]
]
MODELS: list[dict[str, Any]] = [
    {"id": MODEL, "limit": {"context": 4096}},
    {"id": LIMITED, "limit": {"context": 4096, "parallel": 3, "tpm": 20000}},
]


class Ledger:
    """An engine that writes down what arrives: when, from which key, for which model, and the tokens it used. The
    client says its key in `user`."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, str, str, int]] = []
        self.now: Counter[str] = Counter()  # at the same time, by key and by model
        self.most: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        prompt, completion = len(body["messages"][0]["content"]), random.randint(1, body["max_tokens"])
        self.arrivals.append((time.monotonic(), body["user"], body["model"], prompt + completion))
        for name in (body["user"], body["model"]):
            self.now[name] += 1
            self.most[name] = max(self.most[name], self.now[name])
        try:
            await asyncio.sleep(random.random() / 50)
        finally:
            for name in (body["user"], body["model"]):
                self.now[name] -= 1
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return web.json_response({"id": "a", "object": "chat.completion", "choices": [], "usage": usage})


class Clients:
    """Clients that send requests of all keys to all cortexes, and what they got."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.answers: dict[str, Counter[int]] = defaultdict(Counter)
        self.lost = 0  # whose cortex was killed
        self._left = REQUESTS

    async def run(self, http: aiohttp.ClientSession) -> None:
        while self._left > 0:
            self._left -= 1
            entry = KEYS[self._left % len(KEYS)]
            body = {
                "model": LIMITED if self._left % 3 == 0 else MODEL,
                "user": entry["name"],
                "max_tokens": random.randint(1, 200),
                "messages": [{"role": "user", "content": "x" * random.randint(1, 200)}],
            }
            url = self.urls[self._left // len(KEYS) % len(self.urls)]
            headers = {"Authorization": f"Bearer {entry['key']}"}
            try:
                async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                    answer = await response.json()
            except aiohttp.ClientError:
                self.lost += 1
                continue
            self.answers[entry["name"]][response.status] += 1
            if response.status == 429:
                code = answer["error"]["code"]
                assert code in ("rate_limit_exceeded", "insufficient_quota"), answer
                assert int(response.headers["Retry-After"]) >= 1
            else:
                assert response.status == 200, answer


def check(ledger: Ledger, begun: float) -> None:
    """No limit was exceeded at any time since the beginning, when all buckets were full."""
    limits: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in KEYS}
    limits |= {model["id"]: model["limit"] for model in MODELS}
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for at, key, model, used in ledger.arrivals:
        minutes = (at - begun) / 60
        for name in (key, model):
            requests[name] += 1
            tokens[name] += used
            rpm, tpm = limits[name].get("rpm"), limits[name].get("tpm")
            assert rpm is None or requests[name] <= rpm * (1 + minutes), name
            assert tpm is None or tokens[name] <= tpm * (1 + minutes), name
    for name, most in ledger.most.items():
        assert most <= limits[name].get("parallel", most), name
    for entry in KEYS:
        if "budget" in entry:
            assert tokens[entry["name"]] <= 4000


def written_keys(directory: Path) -> dict[str, Any]:
    (directory / "keys.toml").write_text(tomli_w.dumps({"keys": KEYS}), encoding="utf-8")
    return {"file": str(directory / "keys.toml")}


async def running(clients: Clients) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        await asyncio.gather(*(clients.run(http) for _ in range(CLIENTS)))


@pytest.fixture
def ledger(benjy: V1Neuron) -> Ledger:
    ledger = Ledger()
    benjy.engine.answer = ledger.answer
    benjy.models = {MODEL: "loaded", LIMITED: "loaded"}
    return ledger


@pytest.mark.timeout(120 + REQUESTS / 20)
async def test_no_limit_is_exceeded_over_four_workers(tmp_path: Path, benjy: V1Neuron, ledger: Ledger) -> None:
    async with cortex_process(
        tmp_path, [benjy], MODELS, workers=4, state_dir="state", keys=written_keys(tmp_path)
    ) as cortex:
        begun = time.monotonic()
        clients = Clients([cortex.url])
        await running(clients)
        check(ledger, begun)
        assert clients.lost == 0
        served = sum(answers[200] for answers in clients.answers.values())
        assert served == len(ledger.arrivals)
        assert sum(answers.total() for answers in clients.answers.values()) == REQUESTS
        assert all(answers[200] > 0 for answers in clients.answers.values())
        assert all(clients.answers[name][429] > 0 for name in ("key0", "key3"))  # surely: others need a coincidence


@pytest.mark.timeout(150 + REQUESTS / 20)
async def test_no_limit_is_exceeded_over_two_cortexes_of_which_one_is_killed_and_started_again(
    tmp_path: Path, benjy: V1Neuron, ledger: Ledger, new_postgresql: Callable[[], str]
) -> None:
    database = new_postgresql()
    directories = [tmp_path / "one", tmp_path / "two"]
    for directory in directories:
        directory.mkdir()
    settings: list[dict[str, Any]] = [
        {"database": database, "state_dir": "state", "keys": written_keys(directory)} for directory in directories
    ]
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(cortex_process(directories[0], [benjy], MODELS, **settings[0]))
        two = await stack.enter_async_context(cortex_process(directories[1], [benjy], MODELS, **settings[1]))
        begun = time.monotonic()
        clients = Clients([one.url, two.url])
        work = asyncio.create_task(running(clients))
        while len(ledger.arrivals) < 30:
            await asyncio.sleep(0.01)
            assert not work.done()
        two.process.kill()
        await two.process.wait()
        again = await stack.enter_async_context(cortex_process(directories[1], [benjy], MODELS, **settings[1]))
        clients.urls[1] = again.url
        await work
        check(ledger, begun)
        answered = sum(answers.total() for answers in clients.answers.values())
        assert answered + clients.lost == REQUESTS
        assert sum(answers[200] for answers in clients.answers.values()) <= len(ledger.arrivals)
        # What the killed one had reserved no longer counts as running, and the budgets are as before.
        headers = {"Authorization": f"Bearer {KEYS[2]['key']}"}
        body = {"model": MODEL, "user": "key2", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        async with aiohttp.ClientSession(headers=headers) as http:
            status = 0
            while status != 200:
                async with http.post(f"{again.url}/v1/chat/completions", json=body) as response:
                    status = response.status
        check(ledger, begun)
