"""Protocol v1 neurons must be asked where their engines answer: how often, and what a burst of requests does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import Answer, V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, plain
from tests.cortex.raw_http import Wire, connected, request, until

MODEL = "org/m"
BODY = b'{"model":"org/m","prompt":"hi"}'
BURST = 20


@pytest.fixture
async def pair() -> AsyncIterator[list[V1Neuron]]:
    """Two neurons with the model loaded."""
    async with contextlib.AsyncExitStack() as stack:
        neurons = [V1Neuron(name, 24000) for name in ("a", "b")]
        for neuron in neurons:
            neuron.models[MODEL] = "loaded"
            await stack.enter_async_context(neuron.running())
        yield neurons


class Holding:
    """Engines that answer once all of a burst has arrived."""

    def __init__(self, neurons: list[V1Neuron]) -> None:
        self._complete = asyncio.Event()
        self.arrived = {neuron.name: 0 for neuron in neurons}
        for neuron in neurons:
            neuron.engine.answer = self._answering(neuron)

    def _answering(self, neuron: V1Neuron):  # type: ignore[no-untyped-def]
        async def answer(_: web.Request) -> web.StreamResponse:
            self.arrived[neuron.name] += 1
            if sum(self.arrived.values()) == BURST:
                self._complete.set()
            await self._complete.wait()
            return web.json_response({})

        return answer


async def complete(url: str) -> int:
    async with connected(url) as client:
        return (await client.ask(request(BODY, "Content-Type: application/json"))).status


def asked(neuron: V1Neuron) -> int:
    """How often its endpoint was asked for."""
    return sum("/endpoint" in call for call in neuron.calls)


async def test_a_first_burst_is_spread(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    """Each request counts from the choice of its replica, not from the neuron's answer where the engine is."""
    cortex = await start_cortex(pair, [{"id": MODEL}], poll={"interval_secs": 60})
    held = Holding(pair)
    assert await asyncio.gather(*(complete(cortex.url) for _ in range(BURST))) == [200] * BURST
    assert held.arrived == {"a": BURST // 2, "b": BURST // 2}
    assert [asked(neuron) for neuron in pair] == [1, 1]


async def test_a_first_burst_is_spread_over_two_workers(pair: list[V1Neuron], tmp_path: Path) -> None:
    """A worker's count reaches the control a moment later than the next request."""
    async with cortex_process(tmp_path, pair, [{"id": MODEL}], poll_secs=60, workers=2) as cortex:
        held = Holding(pair)
        assert await asyncio.gather(*(complete(cortex.url) for _ in range(BURST))) == [200] * BURST
    assert min(held.arrived.values()) >= 7, held.arrived


async def test_an_endpoint_is_asked_for_once(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    """Not for each request, and not for each poll."""
    cortex = await start_cortex(pair, [{"id": MODEL}])  # polls 20 times a second
    for _ in range(30):
        assert await complete(cortex.url) == 200
    polls = pair[0].calls.count("/models")
    await until(lambda: pair[0].calls.count("/models") > polls + 2)
    assert await complete(cortex.url) == 200
    assert [asked(neuron) for neuron in pair] == [1, 1]


@pytest.mark.parametrize("change", ["its own entry", "another model"])
async def test_an_endpoint_is_not_kept_when_an_entry_changes(
    start_cortex: StartCortex, pair: list[V1Neuron], change: str
) -> None:
    """The old port still answers: it may be the other model's by now, and many engines serve any name."""
    one, other = pair
    cortex = await start_cortex([one], [{"id": MODEL}])
    assert await complete(cortex.url) == 200
    one.engine_url = other.engine.url
    if change == "another model":
        one.models["org/other"] = "loaded"
    else:
        one.entries[MODEL] = {"devices": [1]}
    await until(lambda: asked(one) == 2)
    served = len(one.engine.requests)
    assert await complete(cortex.url) == 200
    assert (len(one.engine.requests), len(other.engine.requests)) == (served, 1)


@pytest.mark.parametrize("now", ["closed", "banner", 400, 401, 403, 404, 405, 501, 502, 503])
@pytest.mark.parametrize("workers", [1, 2])
async def test_an_engine_that_moved_between_two_polls(
    pair: list[V1Neuron], tmp_path: Path, now: str | int, workers: int
) -> None:
    """Its old port is closed, another process's, or another model's engine: the neuron is asked again, and no client
    notices."""
    one, other = pair
    old = OldPort()
    async with (
        old.running(),
        cortex_process(tmp_path, [one], [{"id": MODEL}], poll_secs=60, workers=workers) as cortex,
    ):
        one.engine_url = old.url
        for _ in range(8):  # every worker knows the endpoint
            assert await complete(cortex.url) == 200
        before = asked(one)
        one.engine_url = other.engine.url
        await old.becomes(now)
        for _ in range(8):
            assert await complete(cortex.url) == 200
    assert len(other.engine.requests) == 8
    assert asked(one) == before + 1


@pytest.mark.parametrize("status", [401, 404, 405])
async def test_an_engines_own_refusal_reaches_the_client(
    start_cortex: StartCortex, pair: list[V1Neuron], status: int
) -> None:
    """The neuron names the same URL again, so the answer is the engine's."""
    one, _ = pair
    cortex = await start_cortex([one], [{"id": MODEL}], poll={"interval_secs": 60})
    one.engine.answer = answering(status)
    for number in range(1, 4):
        assert await complete(cortex.url) == status
        assert asked(one) == number, "once for each refusal that may come from another server"


async def test_an_endpoint_is_dropped_when_its_model_is_unloaded(
    start_cortex: StartCortex, pair: list[V1Neuron]
) -> None:
    """The model comes back on another port within the poll interval."""
    one, other = pair
    cortex: RunningCortex = await start_cortex([one], [{"id": MODEL}], poll={"interval_secs": 60})
    assert await complete(cortex.url) == 200
    async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": MODEL}) as response:
        assert response.status == 200
    one.engine_url = other.engine.url
    assert await complete(cortex.url) == 200
    assert (len(one.engine.requests), len(other.engine.requests)) == (1, 1)


class OldPort:
    """An engine's port, which becomes something else."""

    def __init__(self) -> None:
        self._engine = RawEngine()
        self._engine.script = self._answer
        self._now: str | int = "engine"
        self._stack = contextlib.AsyncExitStack()

    @property
    def url(self) -> str:
        return self._engine.url

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._stack:
            await self._stack.enter_async_context(self._engine.running())
            yield

    async def becomes(self, now: str | int) -> None:
        self._now = now
        if now == "closed":
            await self._stack.aclose()
        elif now == "banner":
            self._engine.on_connect = greet
            for wire in self._engine.open_connections:
                wire.reset()

    async def _answer(self, wire: Wire, received: Received) -> None:
        if self._now == "engine":
            await wire.send(plain(b"{}"))
        else:
            error = {"message": "The model `org/m` does not exist.", "type": "NotFoundError", "code": self._now}
            await wire.send(plain(json.dumps({"error": error}).encode(), status=f"{self._now} Refused"))


async def greet(wire: Wire) -> None:
    await wire.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    await wire.gone.wait()


def answering(status: int) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    return answer
