"""Protocol v1 neurons must be asked where their engines answer: how often, and what a burst of requests does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import connected, request

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


async def test_an_endpoint_is_kept_for_a_poll_interval(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    cortex = await start_cortex(pair, [{"id": MODEL}], poll={"interval_secs": 60})
    for _ in range(30):
        assert await complete(cortex.url) == 200
    assert [asked(neuron) for neuron in pair] == [1, 1]


async def test_an_endpoint_is_not_kept_longer(start_cortex: StartCortex, pair: list[V1Neuron]) -> None:
    """The old engine still answers, but the neuron has started another."""
    one, other = pair
    cortex = await start_cortex([one], [{"id": MODEL}])  # polls 20 times a second
    assert await complete(cortex.url) == 200
    one.engine_url = other.engine.url
    while not other.engine.requests:
        assert await complete(cortex.url) == 200
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert MODEL not in cortex.parts.routes.table, "no request asks for an idle model"
    before = asked(one)
    await asyncio.sleep(0.2)
    assert asked(one) == before


@pytest.mark.parametrize("failure", ["refused", "503"])
async def test_an_endpoint_is_dropped_at_the_first_failure(
    start_cortex: StartCortex, pair: list[V1Neuron], failure: str
) -> None:
    """The engine moved within the poll interval: the neuron is asked again, and no client notices."""
    one, other = pair
    async with moved(one, failure):
        cortex = await start_cortex([one], [{"id": MODEL}], poll={"interval_secs": 60})
        assert await complete(cortex.url) == 200
    one.engine_url = other.engine.url
    if failure == "503":
        one.engine.answer = unavailable
    for _ in range(3):
        assert await complete(cortex.url) == 200
    assert len(other.engine.requests) == 3
    assert asked(one) == 2


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


@contextlib.asynccontextmanager
async def moved(neuron: V1Neuron, failure: str) -> AsyncIterator[None]:
    """Inside the body, a neuron whose engine is gone afterwards if it then refuses."""
    if failure != "refused":
        yield
        return
    gone = V1Neuron("gone", 1)
    async with gone.running():
        neuron.engine_url = gone.engine.url
        yield


async def unavailable(_: web.Request) -> web.StreamResponse:
    return web.Response(status=503)
