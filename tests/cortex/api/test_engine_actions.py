"""Sleep, wake and restart, and what an action would do before it is done. With real engines: tests/browser."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cortex.api.test_operator import Gated, chat
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

SMALL, OTHER = {"id": "org/small", "vram_mb": 20000}, {"id": "org/other", "vram_mb": 20000}


async def act(cortex: RunningCortex, path: str, **body: object) -> tuple[int, Any]:
    async with cortex.http.post(f"{cortex.url}/fleet/{path}", json={"model": "org/small", **body}) as response:
        return response.status, await response.json()


async def test_a_load_says_before_what_it_displaces(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models, benjy.used_mb = {"org/other": "loaded"}, [20000]
    benjy.entries = {"org/other": {"vram_used_mb": 20000}}
    cortex = await start_cortex([benjy], [SMALL, OTHER], placement={"min_residency_secs": 0})
    status, answer = await act(cortex, "load?dry_run=true")
    assert (status, answer["evict"]) == (200, ["org/other"])
    assert "Displaces org/other on benjy." in answer["effects"]
    status, answer = await act(cortex, "unload?dry_run=true", model="org/other")
    assert answer["effects"] == [
        "org/other is unloaded from benjy, GPU 0: no request is running there.",
        "Nothing else serves it.",
        "The next request loads it again.",
    ]
    assert (await act(cortex, "load?dry_run=maybe"))[0] == 400
    assert (benjy.loads, benjy.unloads) == ([], [])


async def test_a_restart(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Requests in flight finish first; those that come meanwhile wait for the new engine."""
    benjy.models, benjy.engine.answer = {"org/small": "loaded"}, (answer := Gated())
    cortex = await start_cortex([benjy], [SMALL])
    before = asyncio.create_task(chat(cortex))
    await answer.entered.wait()
    _, would = await act(cortex, "restart?dry_run=true")
    assert would["effects"][0] == ("org/small is started again on benjy, GPU 0: 1 running request is finished first.")
    restarting = asyncio.create_task(act(cortex, "restart", node="benjy"))
    await cortex.until(lambda: bool(cortex.parts.fleet.snapshot().evicting))
    during = asyncio.create_task(chat(cortex))
    assert (benjy.unloads, benjy.loads) == ([], [])
    answer.gate.set()
    assert await before == (200, {"whole": True})
    status, done = await restarting
    assert (status, done["results"]) == (200, [{"node": "benjy", "status": "loaded"}])
    assert await during == (200, {"whole": True})
    assert (benjy.unloads, [load["model_id"] for load in benjy.loads]) == (["org/small"], ["org/small"])
    assert not cortex.parts.fleet.snapshot().reservations


async def test_two_restarts_at_once(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The others are refused, whether the engine is ending or starting, and the first one goes on."""
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [SMALL])
    benjy.unload_gate.clear()
    benjy.load_gate.clear()
    first = asyncio.create_task(act(cortex, "restart"))
    await cortex.until(lambda: bool(benjy.unloads))
    status, answer = await act(cortex, "restart")
    assert (status, answer["error"]["code"]) == (409, "load_in_progress")
    assert answer["error"]["message"] == "'org/small' on benjy is being started already: wait until it is loaded"
    benjy.unload_gate.set()
    await cortex.until(lambda: bool(benjy.loads))
    status, answer = await act(cortex, "restart")
    assert (status, answer["error"]["code"]) == (409, "load_in_progress")
    assert answer["error"]["message"] == "'org/small' is being started on benjy: wait until it is loaded"
    benjy.load_gate.set()
    assert (await first)[0] == 200
    assert (benjy.unloads, len(benjy.loads)) == (["org/small"], 1)


async def test_a_restart_goes_on_without_its_client(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The engine that it has ended comes back."""
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [SMALL])
    benjy.unload_gate.clear()
    restarting = asyncio.create_task(act(cortex, "restart"))
    await cortex.until(lambda: bool(benjy.unloads))
    restarting.cancel()
    await asyncio.gather(restarting, return_exceptions=True)
    for _ in range(5):  # meanwhile cortex notices that the client has left
        async with cortex.http.get(f"{cortex.url}/fleet") as response:
            await response.read()
    benjy.unload_gate.set()
    await cortex.until(lambda: [load["model_id"] for load in benjy.loads] == ["org/small"])


@pytest.mark.parametrize("status", ["failed", "sleeping"])
async def test_a_restart_of_an_engine_without_memory_may_displace_others(
    start_cortex: StartCortex, benjy: V1Neuron, status: str
) -> None:
    benjy.models, benjy.used_mb = {"org/small": status, "org/other": "loaded"}, [20000]
    benjy.entries = {"org/other": {"vram_used_mb": 20000}, "org/small": {"vram_used_mb": 0}}
    cortex = await start_cortex([benjy], [SMALL, OTHER], placement={"min_residency_secs": 0})
    _, answer = await act(cortex, "restart?dry_run=true")
    assert answer["evict"] == ["org/other"]
    assert "Displaces org/other on benjy." in answer["effects"]
    assert not any("kept" in effect for effect in answer["effects"])


async def test_an_end_says_before_that_the_model_is_loaded_again(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [{**SMALL, "replicas": {"min": 1}}])
    for action, again in (("unload", "loads it again"), ("sleep", "wakes it, or loads it elsewhere")):
        _, answer = await act(cortex, f"{action}?dry_run=true")
        assert answer["effects"][-1] == f"cortex {again}, as soon as there is room, because its replicas.min is 1."
    _, held = await act(cortex, "unload?dry_run=true", for_secs=60)
    assert "replicas.min" not in str(held["effects"])


@pytest.mark.parametrize(
    ("action", "model", "expected"),
    [
        ("sleep", "org/small", (502, "sleep_failed")),  # a neuron of protocol v1 cannot
        ("wake", "org/small", (404, "model_not_found")),
        ("restart", "org/foreign", (404, "model_not_found")),
        ("sleep", "org/none", (404, "model_not_found")),
    ],
)
async def test_refusals(
    start_cortex: StartCortex, benjy: V1Neuron, action: str, model: str, expected: tuple[int, str]
) -> None:
    """The engine stays as it is."""
    benjy.models = {"org/small": "loaded", "org/foreign": "loaded"}
    cortex = await start_cortex([benjy], [SMALL])
    status, answer = await act(cortex, action, model=model)
    assert (status, answer["error"]["code"]) == expected
    assert (benjy.unloads, benjy.loads) == ([], [])
    assert not cortex.parts.fleet.snapshot().evicting
