"""Operator actions drain like evictions and report every node's result."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.cortex.api.keyed_fleet import key_entry
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.fleets import replica_key
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

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
        await cortex.until(lambda: replica_key("org/small", "slow") in cortex.parts.fleet.snapshot().evicting)
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


KEPT = {**MODEL, "replicas": {"min": 1}}


async def posted(cortex: RunningCortex, path: str, **body: object) -> Any:
    async with cortex.http.post(f"{cortex.url}{path}", json=body) as response:
        return await response.json()


async def got(cortex: RunningCortex, path: str) -> Any:
    async with cortex.http.get(f"{cortex.url}{path}") as response:
        return await response.json()


@pytest.mark.parametrize(
    ("model", "text", "node"),
    [
        (MODEL, "the next request loads it again", None),
        (
            KEPT,
            "it will be loaded again at once, on benjy, because its replicas.min is 1; "
            "`cortex unload org/small --for 2h` holds it back",
            "benjy",
        ),
    ],
)
async def test_an_unload_says_what_becomes_of_the_model(
    start_cortex: StartCortex, benjy: V1Neuron, model: dict[str, Any], text: str, node: str | None
) -> None:
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [model])
    body = (await unload(cortex))[1]
    assert (body["next"], body["next_node"], body["held_until"]) == (text, node, None)


async def test_a_model_with_other_replicas_goes_on(start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """What is left is enough; or there is no room for another."""
    benjy.models = {"org/small": "loaded"}
    beast.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy, beast], [{**KEPT, "pinned_on": ["benjy", "beast"]}])
    assert (await unload(cortex, node="benjy"))[1]["next"] == "beast still serves it"


async def test_a_model_that_is_held_back_is_not_loaded(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Neither for `replicas.min` nor for a request, until an operator loads it; everything shows for how long."""
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [KEPT])
    status, body = await unload(cortex, for_secs=7200)
    assert (status, body["next_node"]) == (200, None)
    (held,) = (await got(cortex, "/fleet"))["held"]
    assert (held["model"], held["node"], held["until"]) == ("org/small", None, body["held_until"])
    assert 7100 < held["remaining_secs"] <= 7200
    async with cortex.chat("org/small") as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (503, "unavailable")
        assert 7100 < int(response.headers["retry-after"]) <= 7200
    assert "holds it back for another 2 h; `cortex load org/small` ends that" in error["message"]
    plan = await got(cortex, "/fleet/explain?model=org/small")
    assert plan["decision"]["action"] == "refuse"
    assert plan["nodes"][0]["reason"] == "an operator holds it back for another 2 h"
    assert 7100 < plan["nodes"][0]["retry_in_secs"] <= 7200
    await asyncio.sleep(1.5)  # more than one round of replica control
    assert benjy.loads == []
    assert (await posted(cortex, "/fleet/load", model="org/small"))["status"] == "loaded"
    assert (await got(cortex, "/fleet"))["held"] == []


async def test_replicas_come_back_when_the_hold_is_over(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy], [KEPT])
    await unload(cortex, for_secs=1.5)
    await cortex.until(lambda: bool(benjy.loads))
    await cortex.until(lambda: bool(cortex.parts.fleet.snapshot().serving("org/small")))


async def test_a_model_may_be_held_back_on_one_neuron(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
) -> None:
    """It is loaded on another one."""
    benjy.models = {"org/small": "loaded"}
    cortex = await start_cortex([benjy, beast], [MODEL])
    assert (await unload(cortex, node="benjy", for_secs=3600))[0] == 200
    async with cortex.chat("org/small") as response:
        assert response.headers["x-cortex-node"] == "beast"
    assert benjy.loads == []


async def test_a_model_that_is_loaded_nowhere_can_be_held_back(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """An unknown model cannot; neither can one be held back for no time, or without an end."""
    cortex = await start_cortex([benjy], [MODEL])
    assert (await unload(cortex))[0] == 404
    assert (await unload(cortex, for_secs=60))[1]["nodes"] == []
    assert (await unload(cortex, model="org/none", for_secs=60))[0] == 404
    for secs in (0, -1, 1e12):
        assert (await unload(cortex, for_secs=secs))[0] == 400


async def test_waiting_requests_learn_that_their_model_is_held_back(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Their load waits for a busy model to finish: it is dropped, and the busy model stays."""
    benjy.models, benjy.engine.answer = {"org/busy": "loaded"}, (answer := Gated())
    benjy.used_mb, benjy.entries = [20000], {"org/busy": {"vram_used_mb": 20000}}
    busy, wanted = {"id": "org/busy", "vram_mb": 20000}, {"id": "org/small", "vram_mb": 20000}
    cortex = await start_cortex([benjy], [busy, wanted], placement={"patience_secs": 0, "min_residency_secs": 0})

    async def ask(model: str) -> int:
        async with cortex.chat(model) as response:
            await response.read()
            return int(response.status)

    working = asyncio.create_task(ask("org/busy"))
    await answer.entered.wait()
    waiting = asyncio.create_task(ask("org/small"))
    await cortex.until(lambda: replica_key("org/busy", "benjy") in cortex.parts.fleet.snapshot().evicting)
    assert (await unload(cortex, for_secs=60))[0] == 200
    assert await waiting == 503
    answer.gate.set()
    assert await working == 200
    assert benjy.unloads == []


async def test_a_hold_survives_a_restart_of_cortex(tmp_path: Path, benjy: V1Neuron) -> None:
    benjy.models = {"org/small": "loaded"}
    state = str(tmp_path / "state")
    async with aiohttp.ClientSession() as http:
        async with cortex_process(tmp_path, [benjy], [KEPT], state_dir=state) as cortex:
            body = {"model": "org/small", "for_secs": 3600}
            async with http.post(f"{cortex.url}/fleet/unload", json=body) as response:
                assert "warning" not in await response.json()
            cortex.process.kill()  # right after the answer
        async with cortex_process(tmp_path, [benjy], [KEPT], state_dir=state) as cortex:
            async with http.get(f"{cortex.url}/fleet") as response:
                assert [held["model"] for held in (await response.json())["held"]] == ["org/small"]
            asked = json.dumps({"model": "org/small"}).encode()
            async with http.post(f"{cortex.url}/v1/completions", data=asked) as response:
                assert response.status == 503
    assert benjy.loads == []


async def test_explain_says_until_when_a_failed_load_is_not_tried_again(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
) -> None:
    benjy.load_error = 500, {"error": {"message": "no memory", "code": "load_failed", "cause": "node"}}
    cortex = await start_cortex([benjy, beast], [{**MODEL, "pinned_on": ["benjy"]}])
    async with cortex.chat("org/small") as response:
        assert response.status == 503
    nodes = {node["node"]: node for node in (await got(cortex, "/fleet/explain?model=org/small"))["nodes"]}
    assert 8 < nodes["benjy"]["retry_in_secs"] <= 10
    assert nodes["beast"]["retry_in_secs"] is None


async def test_what_did_not_end_well_is_in_the_log(
    start_cortex: StartCortex, benjy: V1Neuron, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asked for it, and what became of it. What stands for a name that is unknown may be a key."""
    caplog.set_level(logging.INFO, "cortex.api.authorization")
    cortex = await start_cortex([benjy], [MODEL], keys=key_entry("root", "admin"))
    admin = {"Authorization": "Bearer sk-root"}
    async with cortex.http.post(f"{cortex.url}/fleet/nodes/sk-secret/drain", headers=admin, json={}) as response:
        assert response.status == 404
    benjy.load_gate.clear()
    loading = asyncio.create_task(
        cortex.http.post(f"{cortex.url}/fleet/load", headers=admin, json={"model": "org/small"})
    )
    await benjy.load_started.wait()
    loading.cancel()
    await until(lambda: len(caplog.messages) == 2)
    benjy.load_gate.set()
    assert caplog.messages == [
        "POST /fleet/nodes/{name}/drain by root: 404",
        "POST /fleet/load by root: client left",
    ]
