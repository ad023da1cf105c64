"""Operator actions drain like evictions and report every node's result."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = {"id": "org/small", "vram_mb": 4000}


class Gated:
    """An engine answer that waits until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.gate = asyncio.Event(), asyncio.Event()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.entered.set()
        await self.gate.wait()
        return web.json_response({"whole": True})


async def unload(cortex: RunningCortex, **body: object) -> tuple[int, dict[str, object]]:
    async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": "org/small", **body}) as response:
        return response.status, await response.json()


async def chat(cortex: RunningCortex) -> tuple[int, object]:
    async with cortex.chat("org/small") as response:
        return response.status, await response.json()


async def test_unload_waits_for_requests_in_flight(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models, benjy.engine.answer = {"org/small": "loaded"}, (answer := Gated())
    cortex = await start_cortex([benjy], [MODEL])
    request = asyncio.create_task(chat(cortex))
    await answer.entered.wait()
    unloading = asyncio.create_task(unload(cortex))
    await cortex.until(lambda: bool(cortex.parts.fleet.snapshot().evicting))
    assert benjy.unloads == []
    answer.gate.set()
    assert await request == (200, {"whole": True})
    status, body = await unloading
    assert (status, body["results"]) == (200, [{"node": "benjy", "status": "unloaded"}])
    assert benjy.unloads == ["org/small"]
    assert not cortex.parts.fleet.snapshot().evicting


async def test_unload_without_draining_is_immediate(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models, benjy.engine.answer = {"org/small": "loaded"}, (answer := Gated())
    cortex = await start_cortex([benjy], [MODEL])
    request = asyncio.create_task(chat(cortex))
    await answer.entered.wait()
    assert (await unload(cortex, drain=False))[0] == 200
    assert benjy.unloads == ["org/small"]
    answer.gate.set()
    await request


class SlowToUnload(V1Neuron):
    """A neuron whose unloads wait until the test opens the gate."""

    def __init__(self, name: str, *vram_total_mb: int) -> None:
        super().__init__(name, *vram_total_mb)
        self.unload_gate = asyncio.Event()

    async def _unload(self, request: web.Request) -> web.Response:
        await self.unload_gate.wait()
        return await super()._unload(request)


async def test_a_model_gets_no_requests_while_it_is_unloaded(start_cortex: StartCortex) -> None:
    """Also without draining: a request would reach an engine that is being stopped."""
    slow = SlowToUnload("slow", 24000)
    async with slow.running():
        slow.models = {"org/small": "loaded"}
        cortex = await start_cortex([slow], [MODEL])
        unloading = asyncio.create_task(unload(cortex, drain=False))
        await cortex.until(lambda: ("org/small", "slow") in cortex.parts.fleet.snapshot().evicting)
        assert not cortex.parts.fleet.snapshot().serving("org/small")
        slow.unload_gate.set()
        assert (await unloading)[0] == 200
        assert not cortex.parts.fleet.snapshot().evicting


class Stubborn(V1Neuron):
    """A neuron that refuses to unload."""

    async def _unload(self, request: web.Request) -> web.Response:
        return web.json_response({"error": "the engine does not exit"}, status=500)


async def test_every_nodes_result_is_reported(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """A failure on one node does not hide the success on the other."""
    async with Stubborn("stubborn", 24000).running() as stubborn:
        benjy.models = {"org/small": "loaded"}
        stubborn.models = {"org/small": "loaded"}
        cortex = await start_cortex([stubborn, benjy], [MODEL])
        status, body = await unload(cortex)
    error = body["error"]
    assert isinstance(error, dict)
    assert (status, error["code"]) == (502, "unload_failed")
    assert error["results"] == [
        {
            "node": "stubborn",
            "status": "failed",
            "code": "unload_failed",
            "error": "stubborn: the engine does not exit",
        },
        {"node": "benjy", "status": "unloaded"},
    ]
    assert benjy.unloads == ["org/small"]
