"""Neurons that speak protocol v1 and send more than it, with meanings of their own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

MODEL = {"id": "org/small", "vram_mb": 4000, "harness": "candle"}
NODE = "foreign"


class ForeignNeuron(V1Neuron):
    """Adds `more[path]` to its answers: to the object, or to each entry of a list. A function gets the answer."""

    def __init__(self, more: dict[str, Any]) -> None:
        super().__init__(NODE, 24000, harnesses=("candle",))
        self.more = more

    def _routes(self) -> list[web.RouteDef]:
        return [web.RouteDef(each.method, each.path, self._extended(each), each.kwargs) for each in super()._routes()]

    def _extended(self, route: web.RouteDef) -> Any:
        async def answer(request: web.Request) -> web.Response:
            response = await route.handler(request)
            assert isinstance(response, web.Response)
            assert response.text is not None
            data, more = json.loads(response.text), self.more.get(route.path, {})
            if callable(more):
                more(data)
            else:
                for target in data if isinstance(data, list) else [data]:
                    target.update(more)
            return web.json_response(data, status=response.status)

        return answer


def helexa_health(answer: dict[str, Any]) -> None:
    answer["activation"] = {"state": "ready", "pending": [], "in_progress": None, "completed": [], "failed": []}
    admission = {"in_flight": 0, "queue_depth": 0, "max_in_flight": 8, "max_queue_depth": 8, "rejected_timeout": 0}
    answer["models"] = [{"id": MODEL["id"], **admission}]


HELEXA = {
    "/discovery": {"max_prompt_tokens": 0, "cuda_version": None, "driver_version": None},
    "/health": helexa_health,
    "/models": {
        "capabilities": ["text"],
        "limit": {"context": 4096, "output": 4096},
        "cost": None,
        "tool_call": False,
        "reasoning": False,
    },
    "/models/load": {"model_id": MODEL["id"], "elapsed": 1.5},
}
FAILED = [{"model_id": "org/gone", "error": "not found"}]


def odd_device(answer: dict[str, Any]) -> None:
    for device in answer["devices"]:
        del device["temp_c"], device["utilization_pct"]
        device.update(index=float(device["index"]), vram_used_mb=device["vram_used_mb"] + 0.25, power_w="low")


def odd_discovery(answer: dict[str, Any]) -> None:
    answer["devices"][0].update(numa_node="left", uuid=7, compute_capability=8.9)
    answer.update(links=[{"a": 0, "b": 1, "kind": "infinity-fabric"}], version={"major": 1}, instance_id=12)


ODD: dict[str, tuple[dict[str, Any], set[str]]] = {
    "activation": (
        {"/health": {"activation": {"state": 3, "failed": FAILED}}},
        {"/health: activation.failed", "/health: activation.state"},
    ),
    "activity": (
        {"/health": {"models": [{"name": "m"}, {"id": "n", "in_flight": "few"}]}},
        {"/health: models.id", "/health: models.in_flight"},
    ),
    "devices": ({"/health": odd_device}, {"/health: devices.power_w"}),
    "discovery": (
        {"/discovery": odd_discovery},
        {
            "/discovery: devices.numa_node",
            "/discovery: devices.uuid",
            "/discovery: instance_id",
            "/discovery: links.kind",
            "/discovery: version",
        },
    ),
    "models": (
        {"/models": {"progress": "done", "since": "yesterday", "endpoint": {}, "cause": ["x"], "devices": None}},
        {"/models: cause", "/models: endpoint.url", "/models: progress", "/models: since"},
    ),
    "load": ({"/models/load": {"url": 5, "api_key": {}}}, {"/models/load: api_key", "/models/load: url"}),
    "endpoint": ({"/models/{model_id}/endpoint": {"api_key": 7}}, {"/models/{model_id}/endpoint: api_key"}),
    "null": (
        {
            path: {"models": None, "links": None, "progress": None, "activation": None}
            for path in ("/health", "/discovery", "/models")
        },
        set(),
    ),
}


async def fleet_node(cortex: RunningCortex) -> dict[str, Any]:
    async with cortex.http.get(f"{cortex.url}/fleet") as response:
        (node,) = (await response.json())["nodes"]
    assert isinstance(node, dict)
    return node


async def serves_cold_and_warm(cortex: RunningCortex, neuron: V1Neuron) -> None:
    for cold in ("true", "false"):
        async with cortex.chat(str(MODEL["id"])) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-cortex-node"] == NODE
            assert response.headers["x-cortex-cold-start"] == cold
    assert len(neuron.loads) == 1
    async with cortex.http.get(f"{cortex.url}/v1/models") as response:
        (listed,) = (await response.json())["data"]
    assert listed["loaded"]
    assert [each["node"] for each in listed["locations"]] == [NODE]


async def test_helexas_neuron_serves(start_cortex: StartCortex) -> None:
    """Its present answers: listing, cold load and chat work, before and after a default model has failed."""
    async with ForeignNeuron(HELEXA).running() as neuron:
        cortex = await start_cortex([neuron], [MODEL])
        await serves_cold_and_warm(cortex, neuron)
        node = await fleet_node(cortex)
        assert node["healthy"]
        assert node["last_error"] is None
        assert node["ignored_fields"] == ["/health: activation.failed"]
        assert node["activation"]["state"] == "ready"


@pytest.mark.parametrize("case", ODD)
async def test_odd_fields_beyond_protocol_v1_are_left_out(
    start_cortex: StartCortex, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """The neuron serves; `/fleet` shows what was left out, and the log says it once for all polls."""
    more, ignored = ODD[case]
    async with ForeignNeuron(more).running() as neuron:
        cortex = await start_cortex([neuron], [MODEL])
        await serves_cold_and_warm(cortex, neuron)
        await cortex.until(lambda: set(cortex.parts.fleet.node(NODE).ignored_fields) == ignored)
        neuron.used_mb = [3]  # another answer with the same fields
        polls = neuron.calls.count("/health")
        await until(lambda: neuron.calls.count("/health") > polls + 1)
        node = await fleet_node(cortex)
    assert node["healthy"]
    assert set(node["ignored_fields"]) == ignored
    told = [record.getMessage() for record in caplog.records if "ignored a field" in record.getMessage()]
    assert sorted(line.split(" of ", 1)[1].rsplit(": ", 1)[0] for line in told) == sorted(ignored)


async def test_a_field_that_reads_again_is_no_longer_shown(start_cortex: StartCortex) -> None:
    """An upgraded neuron is not shown with the faults of its predecessor."""
    foreign = ForeignNeuron({"/health": {"activation": 5}})
    async with foreign.running() as neuron:
        cortex = await start_cortex([neuron], [MODEL])
        assert (await fleet_node(cortex))["ignored_fields"] == ["/health: activation"]
        foreign.more = {}
        await cortex.until(lambda: not cortex.parts.fleet.node(NODE).ignored_fields)


async def test_breaking_protocol_v1_is_a_miss(start_cortex: StartCortex) -> None:
    """A device without its index cannot be left out: cortex would place models by the wrong devices."""

    def broken(answer: dict[str, Any]) -> None:
        del answer["devices"][0]["index"]

    async with ForeignNeuron({"/health": broken}).running() as neuron:
        cortex = await start_cortex([neuron], [MODEL], wait_healthy=False)
        await asyncio.wait_for(cortex.parts.fleet.until_all_polled(), 5)
        node = await fleet_node(cortex)
    assert not node["healthy"]
    assert "devices.0.index" in node["last_error"]
