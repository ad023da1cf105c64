"""Several engines of one model on one neuron: each is a replica of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from cortex.routing.response_owners import ResponseMaker
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.fleets import replica, replica_key
from tests.cortex.instances_neuron import MODEL, InstancesNeuron

EIGHT = tuple(map(str, range(8)))
CATALOGUE = [{"id": MODEL, "vram_mb": 9000, "replicas": {"min": 0, "max": 8}}]


@pytest.fixture
async def host() -> AsyncIterator[InstancesNeuron]:
    """A neuron with eight instances of the model, one on each device."""
    async with InstancesNeuron("box", *EIGHT).running() as neuron:
        yield neuron


@pytest.fixture
async def cortex(start_cortex: StartCortex, host: InstancesNeuron) -> RunningCortex:
    """A cortex that routes to all of them."""
    running = await start_cortex([host], CATALOGUE)
    assert await ask(running) == 200
    await running.until(lambda: len(running.parts.routes.table.get(MODEL, ())) == len(EIGHT))
    return running


async def ask(cortex: RunningCortex, text: str = "hi") -> int:
    async with cortex.chat(MODEL, messages=[{"role": "user", "content": text}]) as response:
        await response.read()
        return int(response.status)


async def embed(cortex: RunningCortex) -> int:
    """A request without a prefix that some engine might have cached."""
    body = json.dumps({"model": MODEL, "input": "hi"})
    async with cortex.http.post(f"{cortex.url}/v1/embeddings", data=body) as response:
        await response.read()
        return int(response.status)


async def act(cortex: RunningCortex, action: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with cortex.http.post(f"{cortex.url}/fleet/{action}", json={"model": MODEL, **body}) as response:
        return response.status, await response.json()


async def page(cortex: RunningCortex, path: str) -> Any:
    async with cortex.http.get(f"{cortex.url}{path}") as response:
        return await response.json()


def instances(cortex: RunningCortex) -> set[str]:
    """Those in the route table."""
    return {replica.instance for replica in cortex.parts.routes.table.get(MODEL, ())}


async def test_requests_spread_over_the_instances_of_one_neuron(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """24 requests at a time are three for each engine, and each engine's address is asked for by its name."""
    gate, running = asyncio.Event(), 0

    async def wait(request: web.Request) -> web.StreamResponse:
        nonlocal running
        running += 1
        await gate.wait()
        return web.json_response({"model": MODEL})

    before = host.requests()
    for engine in host.engines.values():
        engine.answer = wait
    asked = [asyncio.create_task(embed(cortex)) for _ in range(24)]
    while running < len(asked):  # noqa: ASYNC110 - until all are at engines
        await asyncio.sleep(0.01)
    fleet = await page(cortex, "/fleet")
    gate.set()
    assert set(await asyncio.gather(*asked)) == {200}
    assert {count - before[instance] for instance, count in host.requests().items()} == {3}
    assert {(each["instance"], each["count"]) for each in fleet["in_flight"]} == {(name, 3) for name in EIGHT}
    assert set(host.asked) == set(EIGHT)


async def test_conversations_stay_at_their_instance(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """Prefix affinity chooses among engines, not neurons."""
    before = host.requests()
    for _ in range(6):
        assert await ask(cortex, "the same beginning") == 200
    assert sorted(count - before[name] for name, count in host.requests().items()) == [0] * 7 + [6]


async def test_a_dead_instance_leaves_the_others(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """Its neuron still calls it loaded: the request is sent to another engine of the same neuron."""
    dead = host.engines["3"]

    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise asyncio.CancelledError

    dead.answer = drop
    statuses = [await ask(cortex, f"conversation {number}") for number in range(40)]
    assert set(statuses) == {200}
    host.statuses["3"] = "failed"
    await cortex.until(lambda: instances(cortex) == set(EIGHT) - {"3"})


async def test_an_instance_that_vanishes_from_the_list_is_gone(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """A neuron drops an unloaded instance while others are listed."""
    del host.statuses["5"]
    await cortex.until(lambda: instances(cortex) == set(EIGHT) - {"5"})
    assert await ask(cortex) == 200


async def test_unloading_one_instance_leaves_the_others_served(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """Only its requests are waited for, and only it gets no new ones."""
    gate, busy = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        busy.set()
        await gate.wait()
        return web.json_response({"model": MODEL})

    host.engines["2"].answer = wait
    held = [asyncio.create_task(ask(cortex, f"conversation {number}")) for number in range(16)]
    await asyncio.wait_for(busy.wait(), 10)
    leaving = asyncio.create_task(act(cortex, "unload", node="box", instance="2"))
    await cortex.until(lambda: replica_key(MODEL, "box", "2") in cortex.parts.fleet.snapshot().evicting)
    await cortex.until(lambda: instances(cortex) == set(EIGHT) - {"2"})
    assert {await ask(cortex, f"another {number}") for number in range(16)} == {200}
    assert not host.unloads
    gate.set()
    status, answer = await leaving
    assert set(await asyncio.gather(*held)) == {200}
    assert (status, host.unloads) == (200, ["2"])
    assert answer["results"] == [{"node": "box", "instance": "2", "status": "unloaded"}]
    assert set(host.statuses) == set(EIGHT) - {"2"}


async def test_an_instance_is_unloaded_for_some_time(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """The others stay, and its neuron gets no other one in its place until the time is over or an operator loads it."""
    status, answer = await act(cortex, "unload", node="box", instance="1", for_secs=3600)
    assert (status, host.unloads) == (200, ["1"])
    assert answer["held_until"] > time.time()
    assert instances(cortex) == set(EIGHT) - {"1"}
    assert cortex.parts.scheduler.view().held_until(MODEL, "box") is not None
    assert (await act(cortex, "load", node="box", instance="1"))[0] == 200
    assert cortex.parts.scheduler.view().held_until(MODEL, "box") is None


async def test_an_operator_names_the_instance_to_load(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """One that serves is left alone, another one is loaded beside it."""
    assert await act(cortex, "load", node="box", instance="1") == (
        200,
        {"status": "loaded", "model": MODEL, "node": "box", "instance": "1"},
    )
    assert not host.loads
    assert (await act(cortex, "unload", node="box", instance="6"))[0] == 200
    status, answer = await act(cortex, "load", node="box", instance="6")
    assert (status, answer["instance"], host.loads[0]["instance"]) == (200, "6", "6")


@pytest.mark.parametrize(
    ("action", "body", "status", "text"),
    [
        ("load", {"instance": "1"}, 400, "name the neuron too (--on, node)"),
        ("unload", {"instance": "1"}, 400, "name the neuron too (--on, node)"),
        ("unload", {"node": "box", "instance": "9"}, 404, "no instance '9' of 'org/m', only 0, 1, 2, 3, 4, 5, 6, 7"),
        ("load", {"node": "box", "instance": "a b"}, 400, "instance"),
    ],
)
async def test_an_instance_that_cannot_be_meant(
    cortex: RunningCortex, action: str, body: dict[str, Any], status: int, text: str
) -> None:
    """The error says what to give instead."""
    found, answer = await act(cortex, action, **body)
    assert found == status
    assert text in answer["error"]["message"]


async def test_an_instance_of_a_neuron_with_one_engine_for_each_model(
    start_cortex: StartCortex, host: InstancesNeuron
) -> None:
    """It would ignore the name, and load or unload something else."""
    host.rewrite = lambda answer: {k: v for k, v in answer.items() if k != "instances"} if "os" in answer else answer
    cortex = await start_cortex([host], CATALOGUE)
    status, answer = await act(cortex, "load", node="box", instance="1")
    assert (status, answer["error"]["param"]) == (400, "instance")


async def test_the_lists_name_each_instance(cortex: RunningCortex) -> None:
    """Neurons are listed once."""
    fleet, models = await page(cortex, "/fleet"), await page(cortex, "/v1/models")
    assert [each["instance"] for each in fleet["nodes"][0]["models"]] == list(EIGHT)
    (entry,) = models["data"]
    assert entry["feasible_on"] == ["box"]
    assert [(each["node"], each["instance"], each["status"]) for each in entry["locations"]] == [
        ("box", name, "loaded") for name in EIGHT
    ]


async def test_metrics_add_up_over_instances(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """The labels of the metrics stay; a gauge tells the engines apart."""
    gate = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"model": MODEL})

    for engine in host.engines.values():
        engine.answer = wait
    asked = [asyncio.create_task(embed(cortex)) for _ in range(8)]
    while sum(cortex.parts.counts.all_in_flight().values()) < 8:  # noqa: ASYNC110 - until all are at engines
        await asyncio.sleep(0.01)
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        lines = (await response.text()).splitlines()
    gate.set()
    await asyncio.gather(*asked)
    assert f'cortex_requests_in_flight{{model="{MODEL}",node="box"}} 8.0' in lines
    each = [line for line in lines if line.startswith("cortex_instance_requests_in_flight{")]
    assert len(each) == 8
    assert f'cortex_instance_requests_in_flight{{engine="4",model="{MODEL}",node="box"}} 1.0' in each


async def test_stored_responses_go_to_their_instance(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """Another engine of the same neuron does not know them."""
    for name, engine in host.engines.items():

        async def answer(request: web.Request, name: str = name) -> web.StreamResponse:
            return web.json_response({"id": f"resp_{name}", "model": MODEL, "object": "response"})

        engine.answer = answer
    made: dict[str, str] = {}
    for number in range(30):
        body = json.dumps({"model": MODEL, "input": f"conversation {number}"})
        async with cortex.http.post(f"{cortex.url}/v1/responses", data=body) as response:
            made[(await response.json())["id"]] = ""
    assert len(made) > 3
    for response_id in made:
        async with cortex.http.get(f"{cortex.url}/v1/responses/{response_id}") as response:
            assert (await response.json())["id"] == response_id


async def test_a_stored_response_is_found_after_an_upgrade(cortex: RunningCortex, host: InstancesNeuron) -> None:
    """The state file of an earlier version has no instance: the engine is the first one now, for workers and for the
    control."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"id": "resp_1"})

    host.engines["0"].answer = answer
    cortex.parts.resolver.response_owners.add("resp_1", ResponseMaker(replica(MODEL, "box", url=""), ""))
    assert await page(cortex, "/v1/responses/resp_1") == {"id": "resp_1"}
    maker = await cortex.parts.resolver.engine(replica_key(MODEL, "box"))
    assert maker is not None
    assert maker.instance == "0"


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}@fp8"])
async def test_a_request_waits_until_the_end_of_its_only_engine_is_noticed(
    start_cortex: StartCortex, name: str
) -> None:
    """A stopping engine closes its port before its neuron reports the end. Then the model is loaded again."""
    async with InstancesNeuron("box", "0").running() as host:
        host.variant, engine = "fp8", host.engines["0"]

        async def drop(request: web.Request) -> web.StreamResponse:
            asyncio.get_running_loop().call_later(0.2, end)
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError

        def end() -> None:
            host.statuses["0"], engine.answer = "failed", answer

        async def answer(request: web.Request) -> web.StreamResponse:
            return web.json_response({"model": MODEL})

        engine.answer = drop
        cortex = await start_cortex([host], [{**CATALOGUE[0], "variants": [{"name": "fp8"}]}])
        body = json.dumps({"model": name, "input": "hi"})
        async with cortex.http.post(f"{cortex.url}/v1/embeddings", data=body) as response:
            assert response.status == 200, await response.text()
        assert [load["instance"] for load in host.loads] == ["0"]


async def test_a_host_that_fails_as_a_whole_costs_one_attempt(start_cortex: StartCortex, host: InstancesNeuron) -> None:
    """Its engines are most of the model's replicas. A request is sent to three engines at most, so the second one is on
    another neuron."""

    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise asyncio.CancelledError

    for engine in host.engines.values():
        engine.answer = drop
    async with InstancesNeuron("other", "0").running() as other:
        cortex = await start_cortex([host, other], CATALOGUE)
        await cortex.until(lambda: len(cortex.parts.fleet.snapshot().serving(MODEL)) == 9)
        assert [await ask(cortex, f"conversation {number}") for number in range(20)] == [200] * 20
