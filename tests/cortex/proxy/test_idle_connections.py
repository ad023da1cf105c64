"""An idle connection to an engine is used again while the engine keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.upstream.pool import IDLE_SECS
from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import bounded, connected, request, until

MODEL = "org/small"
ASK = request(b'{"model":"org/small","n":1}')


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[RawEngine]:
    async with RawEngine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        yield engine


@pytest.mark.parametrize("told", [None, 0.1, 60.0])
async def test_as_long_as_the_neuron_says(
    start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine, told: float | None
) -> None:
    """Without a word of the neuron, or if the engine closes sooner, it is closed early."""
    if told is not None:
        benjy.entries[MODEL] = {"keep_alive_secs": told}
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        assert (await client.ask(ASK)).status == 200
        assert (await client.ask(ASK)).status == 200
        assert len(engine.connections) == 1
        if told != 60:
            await bounded(engine.connections[0].gone.wait())
        else:
            await asyncio.sleep(IDLE_SECS + 1.5)
        assert (await client.ask(ASK)).status == 200
    assert len(engine.connections) == (1 if told == 60 else 2)


async def test_closed_when_the_model_is_unloaded(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> None:
    """However long the engine would keep it: it could look busy to its neuron."""
    benjy.entries[MODEL] = {"keep_alive_secs": 60}
    cortex = await start_cortex([benjy], [{"id": MODEL}])
    async with connected(cortex.url) as client:
        assert (await client.ask(ASK)).status == 200
        del benjy.models[MODEL]
        await until(lambda: not cortex.parts.fleet.snapshot().serving(MODEL))
        await bounded(engine.connections[0].gone.wait())
