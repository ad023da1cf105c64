"""A neuron that limits parallel requests gets no more at a time, from all workers together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.translation.chat_engine import COMPLETION
from tests.cortex.raw_http import bounded, connected, request, until
from tests.processes import descendants

MODEL = "org/m"
BODY = b'{"model":"org/m","prompt":"hi"}'
STREAM = b'{"model":"org/m","stream":true,"messages":[{"role":"user","content":"hi"}]}'
MESSAGE = b'{"model":"org/m","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}'
UNTRANSLATABLE = b'{"model":"org/m","max_tokens":5,"messages":[{"role":"user","content":[{"type":"audio"}]}]}'
LIMIT = 3


class LimitedNeuron(V1Neuron):
    """Tells helexa's admission figures. Its engine records how many requests it has at a time, and answers when `gate`
    is set."""

    def __init__(self, name: str, **admission: Any) -> None:
        super().__init__(name, 24000)
        self.models[MODEL] = "loaded"
        self.health["models"] = [{"id": MODEL, "in_flight": 0, "queue_depth": 0, **admission}]
        self.engine.answer = self._answer
        self.gate = asyncio.Event()
        self.now = self.most = self.served = 0

    async def _answer(self, _: web.Request) -> web.StreamResponse:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.002)  # requests overlap also when the gate is open
        finally:
            self.now -= 1
        self.served += 1
        return web.json_response(COMPLETION)

    async def chat_only(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/messages":
            return web.json_response({"detail": "Not Found"}, status=404)
        return await self._answer(request)


@pytest.fixture
async def neuron() -> AsyncIterator[LimitedNeuron]:
    async with LimitedNeuron("n", max_in_flight=LIMIT, max_queue_depth=8).running() as running:
        assert isinstance(running, LimitedNeuron)
        yield running


async def complete(url: str, body: bytes = BODY, *, path: str = "/v1/completions") -> int:
    async with connected(url) as client:
        return (await client.ask(request(body, "Content-Type: application/json", target=path))).status


async def until_none_in_flight(url: str) -> None:
    """Otherwise the model would look busy, and keep its memory."""

    async def look() -> None:
        async with connected(url) as client:
            while json.loads((await client.ask(request(method="GET", target="/fleet"))).body)["in_flight"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    await bounded(look())


@contextlib.asynccontextmanager
async def many(
    url: str, count: int, body: bytes = BODY, *, path: str = "/v1/completions"
) -> AsyncIterator[list[asyncio.Task[int]]]:
    tasks = [asyncio.create_task(complete(url, body, path=path)) for _ in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_the_surplus_waits(neuron: LimitedNeuron, tmp_path: Path, workers: int) -> None:
    """It is served as the others end, and no seat stays empty."""
    async with cortex_process(tmp_path, [neuron], [{"id": MODEL}], workers=workers) as cortex:
        async with many(cortex.url, 40) as tasks:
            await until(lambda: neuron.now == LIMIT)
            neuron.gate.set()
            assert await bounded(asyncio.gather(*tasks)) == [200] * 40
        assert neuron.most == LIMIT
        neuron.gate.clear()
        async with many(cortex.url, LIMIT):  # everything was given back
            await until(lambda: neuron.now == LIMIT)


@pytest.mark.parametrize("workers", [1, 2])
async def test_clients_that_leave_give_their_seats_back(neuron: LimitedNeuron, tmp_path: Path, workers: int) -> None:
    """Those that are served and those that wait."""
    async with cortex_process(tmp_path, [neuron], [{"id": MODEL}], workers=workers) as cortex:
        for _ in range(3):
            async with many(cortex.url, 12):
                await until(lambda: neuron.now == LIMIT)
            await until(lambda: neuron.now == 0)
        await until_none_in_flight(cortex.url)
        neuron.most = 0  # an engine learns a moment later than cortex that a client has left
        neuron.gate.set()
        async with many(cortex.url, 12) as tasks:
            assert await bounded(asyncio.gather(*tasks)) == [200] * 12
    assert neuron.most == LIMIT


async def test_a_dead_workers_seats_are_free(neuron: LimitedNeuron, tmp_path: Path) -> None:
    async with cortex_process(tmp_path, [neuron], [{"id": MODEL}], workers=2) as cortex:
        async with many(cortex.url, 12):
            await until(lambda: neuron.now == LIMIT)
            for pid in descendants(cortex.process.pid):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: neuron.now == 0)
        neuron.gate.set()
        async with many(cortex.url, 12) as tasks:
            assert await bounded(asyncio.gather(*tasks)) == [200] * 12


async def test_the_surplus_goes_to_another_replica(start_cortex: StartCortex, neuron: LimitedNeuron) -> None:
    """One without a limit takes everything else; the choice among them stays by work until one is full."""
    async with LimitedNeuron("other").running() as other:
        assert isinstance(other, LimitedNeuron)
        cortex = await start_cortex([neuron, other], [{"id": MODEL}])
        async with many(cortex.url, 20):
            await until(lambda: neuron.now + other.now == 20)
            assert neuron.now == LIMIT


@pytest.mark.parametrize(
    "admission",
    [
        {},
        {"max_in_flight": 0},
        {"max_in_flight": None},
        {"max_in_flight": "many"},
        {"max_in_flight": -1, "anon_max_in_flight": 0},
    ],
    ids=str,
)
async def test_no_limit(start_cortex: StartCortex, admission: dict[str, Any]) -> None:
    """0 is how helexa's neuron says that it does not know."""
    async with LimitedNeuron("n", **admission).running() as neuron:
        assert isinstance(neuron, LimitedNeuron)
        cortex = await start_cortex([neuron], [{"id": MODEL}])
        async with many(cortex.url, 10):
            await until(lambda: neuron.now == 10)


async def test_seats_for_requests_without_an_account(start_cortex: StartCortex) -> None:
    """helexa's neuron keeps some seats for callers that it knows; cortex is none of them."""
    async with LimitedNeuron("n", max_in_flight="8", anon_max_in_flight=2.0).running() as neuron:
        assert isinstance(neuron, LimitedNeuron)
        cortex = await start_cortex([neuron], [{"id": MODEL}])
        async with many(cortex.url, 6) as tasks:
            await until(lambda: neuron.now == 2)
            neuron.gate.set()
            assert await bounded(asyncio.gather(*tasks)) == [200] * 6
    assert neuron.most == 2


class FullOfAdapters(LimitedNeuron):
    """Its engine has another LoRA adapter, which stays."""

    def __init__(self, name: str, **admission: Any) -> None:
        super().__init__(name, **admission)
        self.entries[MODEL] = {"max_loras": 1, "adapters": ["other"]}

    def _routes(self) -> list[web.RouteDef]:
        return [*super()._routes(), web.post("/adapters/load", self._refuse_adapter)]

    async def _refuse_adapter(self, _: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "full", "code": "adapters_full"}}, status=409)


async def test_requests_do_not_wait_for_those_that_need_an_adapter(start_cortex: StartCortex) -> None:
    """A request for an adapter that the engine has no room for keeps no seat from requests for the model."""
    async with FullOfAdapters("n", max_in_flight=1).running() as neuron:
        assert isinstance(neuron, LimitedNeuron)
        cortex = await start_cortex([neuron], [{"id": MODEL}, {"id": "a", "base": MODEL, "lora": "/srv/a"}])
        async with many(cortex.url, 1, BODY.replace(MODEL.encode(), b"a")) as waiting:
            await until(lambda: cortex.parts.queue.count(MODEL) == 1)
            async with many(cortex.url, 3) as tasks:
                await until(lambda: neuron.now == 1)
                neuron.gate.set()
                assert await bounded(asyncio.gather(*tasks)) == [200] * 3
            assert not waiting[0].done()


async def test_a_limit_that_rises_lets_more_in(start_cortex: StartCortex, neuron: LimitedNeuron) -> None:
    cortex = await start_cortex([neuron], [{"id": MODEL}])
    async with many(cortex.url, 10):
        await until(lambda: neuron.now == LIMIT)
        neuron.health["models"][0]["max_in_flight"] = 7
        await until(lambda: neuron.now == 7)
        neuron.health["models"] = []
        await until(lambda: neuron.now == 10)


async def test_a_failing_engine_gives_its_seats_back(start_cortex: StartCortex, neuron: LimitedNeuron) -> None:
    cortex = await start_cortex([neuron], [{"id": MODEL}])
    neuron.engine.answer = unavailable
    for _ in range(2 * LIMIT):
        assert await complete(cortex.url) == 503
    neuron.engine.answer = neuron._answer
    async with many(cortex.url, 10):
        await until(lambda: neuron.now == LIMIT)


@pytest.mark.parametrize("workers", [1, 2])
async def test_requests_that_are_translated(neuron: LimitedNeuron, tmp_path: Path, workers: int) -> None:
    """One that is sent again, translated, counts once; one that cannot be translated gives its seat back."""
    neuron.engine.answer = neuron.chat_only
    async with cortex_process(tmp_path, [neuron], [{"id": MODEL}], workers=workers) as cortex:
        for _ in range(2):
            for _ in range(2 * LIMIT):
                assert await complete(cortex.url, UNTRANSLATABLE, path="/v1/messages") == 400
                await until_none_in_flight(cortex.url)
            async with many(cortex.url, 12, MESSAGE, path="/v1/messages") as tasks:
                await until(lambda: neuron.now == LIMIT)
                neuron.gate.set()
                assert await bounded(asyncio.gather(*tasks)) == [200] * 12
            neuron.gate.clear()
        assert neuron.most == LIMIT


async def test_a_waiting_stream_is_told_why(start_cortex: StartCortex, neuron: LimitedNeuron) -> None:
    """It is not called a cold start."""
    cortex: RunningCortex = await start_cortex([neuron], [{"id": MODEL}], waiting={"first_comment_secs": 0.05})
    async with many(cortex.url, LIMIT):
        await until(lambda: neuron.now == LIMIT)
        async with connected(cortex.url) as client:
            await client.send(request(STREAM, "Content-Type: application/json"))
            said = await bounded(client.incoming.readuntil(b"waiting for one to end"))
    assert b"takes 3 at a time" in said
    assert b"x-cortex-cold-start: true" not in said


async def unavailable(_: web.Request) -> web.StreamResponse:
    return web.Response(status=503)
