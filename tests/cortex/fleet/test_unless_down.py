"""A protocol v1 neuron goes down while it carries out a command: its answer comes only at the end."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import bounded

SMALL = {"id": "org/small", "vram_mb": 4000}


async def _status(asking: Any) -> int:
    async with asking as response:
        await response.read()
        return int(response.status)


async def test_requests_move_on_from_a_neuron_that_dies_during_a_load(start_cortex: StartCortex) -> None:
    """Its host sends no FIN, or the process hangs: the connection of the load stays open. When it comes back with the
    model, the surplus copy goes."""
    a, b = V1Neuron("a", 24000), V1Neuron("b", 24000)
    a.load_gate.clear()
    async with a.running(), b.running():
        rules = {"scale_down_secs": 0.5}
        cortex = await start_cortex([a, b], [SMALL], placement=rules, poll={"timeout_secs": 0.2})
        fleet = cortex.parts.fleet
        asks = [asyncio.create_task(_status(cortex.chat("org/small"))) for _ in range(3)]
        await bounded(a.load_started.wait())
        a.answers.clear()
        assert await bounded(asyncio.gather(*asks)) == [200] * 3
        assert len(b.loads) == 1
        assert not fleet.snapshot().reservations
        a.models["org/small"] = "loaded"
        a.answers.set()
        await cortex.until(lambda: len(fleet.snapshot().serving("org/small")) == 2)
        await cortex.until(lambda: len(fleet.snapshot().serving("org/small")) == 1)


async def test_a_neuron_too_busy_with_its_load_to_answer_polls_is_waited_for(
    start_cortex: StartCortex, benjy: V1Neuron
) -> None:
    """Unless another one can hold the model."""
    benjy.load_gate.clear()
    async with V1Neuron("tiny", 24000, harnesses=("other",)).running() as tiny:
        cortex = await start_cortex([benjy, tiny], [SMALL], poll={"timeout_secs": 0.2})
        asking = asyncio.create_task(_status(cortex.chat("org/small")))
        await bounded(benjy.load_started.wait())
        benjy.answers.clear()
        await cortex.until(lambda: not cortex.parts.fleet.node("benjy").healthy)
        misses = cortex.parts.fleet.node("benjy").misses
        await cortex.until(lambda: cortex.parts.fleet.node("benjy").misses > misses + 1)
        benjy.load_gate.set()
        benjy.answers.set()
        assert await bounded(asking) == 200
        assert len(benjy.loads) == 1


async def test_an_unload_on_a_neuron_that_dies_ends(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The operator is told that the neuron is down."""
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [SMALL], poll={"timeout_secs": 0.2})
    benjy.answers.clear()
    async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": "org/small"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (503, "neuron_unavailable")
    assert "benjy is down" in error["message"]
    assert not cortex.parts.fleet.snapshot().evicting
