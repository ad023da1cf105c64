"""The scheduler between decisions and their effects, against real protocol v1 neurons."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from cortex.config.neurons import NeuronEntry
from cortex.control import scheduler
from cortex.control.loads.evictor import DRAIN_POLL_SECS
from cortex.control.scheduler import PLANNER, Policy
from cortex.placement.fair_queue import LoadSchedule
from cortex.placement.inputs import PlanningView
from tests.cortex.conftest import StartCortex
from tests.cortex.fleets import replica_key
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import Received, plain
from tests.cortex.raw_http import Wire, bounded
from tests.cortex.raw_neuron import RawNeuron

LOW = {"id": "org/low", "vram_mb": 20000}
HIGH = {"id": "org/high", "vram_mb": 20000, "residency_priority": 200}


async def test_simultaneous_requests_for_two_models_cause_one_load_each(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """A load that has just started is visible to the next decision in the same loop iteration."""
    benjy.load_gate.clear()
    beast.load_gate.clear()
    cortex = await start_cortex([benjy, beast], [LOW, HIGH])
    parts = cortex.parts
    ensure_scheduled, retry_after = parts.scheduler.ensure_scheduled, parts.scheduler.retry_after
    with parts.queue.ticket("org/low", retry_after):
        ensure_scheduled("org/low")
        with parts.queue.ticket("org/high", retry_after):
            ensure_scheduled("org/high")
            jobs = [(job.model_id, job.node) for job in parts.loader.jobs()]
    assert jobs == [("org/low", "benjy"), ("org/high", "beast")]


async def test_a_bug_in_a_load_fails_the_waiting_requests(
    start_cortex: StartCortex, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load's reservation is released too."""

    def broken(*_: Any) -> Any:
        raise KeyError("broken")

    monkeypatch.setattr("cortex.control.loads.loader.load_command", broken)
    cortex = await start_cortex([benjy], [LOW])
    async with cortex.chat("org/low") as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (503, "cold_load_failed")
    assert not cortex.parts.fleet.snapshot().reservations


async def test_a_bug_in_planning_is_an_error_and_planning_continues(
    start_cortex: StartCortex, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests during the failure get 500 instead of hanging; afterwards cold loads work again."""
    cortex = await start_cortex([benjy], [LOW, HIGH])

    def fails(_: PlanningView) -> LoadSchedule:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(cortex.parts.scheduler, "_policy", Policy(fails, PLANNER.reconcile_replicas))
        assert await bounded(_status(cortex.chat("org/low"))) == 500
    assert await bounded(_status(cortex.chat("org/high"))) == 200


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


class Stubborn(V1Neuron):
    """A neuron that refuses to unload."""

    async def _unload(self, request: web.Request) -> web.Response:
        self.unloads.append((await request.json())["model_id"])
        return web.json_response({"error": "it does not end"}, status=500)


async def test_remaining_evictions_are_skipped_when_one_is_refused(start_cortex: StartCortex) -> None:
    """Two evictions are needed. The neuron refuses one, so the other model, still busy, stays, and the waiting request
    fails without waiting for it to finish."""
    benjy = Stubborn("benjy", 24000)
    benjy.models, benjy.used_mb, benjy.engine.answer = {"org/busy": "loaded", "org/idle": "loaded"}, [20000], hang
    async with benjy.running():
        impatient = {"patience_secs": 0, "min_residency_secs": 0}
        cortex = await start_cortex([benjy], [HIGH], placement=impatient)
        busy = asyncio.create_task(_status(cortex.chat("org/busy")))
        await bounded(_until(lambda: bool(benjy.engine.requests)))
        waiting = asyncio.create_task(_status(cortex.chat("org/high")))
        await bounded(_until(lambda: cortex.parts.scheduler.view().backoff("org/high", "benjy") is not None))
        assert not cortex.parts.fleet.snapshot().evicting
        assert "org/busy" not in benjy.unloads
        busy.cancel()
        waiting.cancel()


@pytest.mark.parametrize("end", ["it leaves the configuration", "it goes down"])
async def test_an_eviction_does_not_wait_for_requests_on_a_dead_neuron(start_cortex: StartCortex, end: str) -> None:
    """One model is being drained for another: requests that wait for the other get an error."""
    benjy = V1Neuron("benjy", 24000)
    benjy.models, benjy.used_mb, benjy.engine.answer = {"org/low": "loaded"}, [20000], hang
    async with benjy.running():
        impatient = {"patience_secs": 0, "min_residency_secs": 0}
        cortex = await start_cortex([benjy], [LOW, HIGH], placement=impatient)
        busy = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(_until(lambda: bool(benjy.engine.requests)))
        waiting = asyncio.create_task(_status(cortex.chat("org/high")))
        await bounded(cortex.until(lambda: replica_key("org/low", "benjy") in cortex.parts.fleet.snapshot().evicting))
        if end == "it goes down":
            benjy.silent = True
        else:
            cortex.parts.fleet.configure([], unhealthy_after=3)
            cortex.parts.membership.configure([], cortex.parts.config.poll)
        assert await bounded(waiting) == 503
        assert not cortex.parts.loader.jobs()
        busy.cancel()


async def test_a_late_endpoint_is_not_used_for_a_model_that_is_being_evicted(start_cortex: StartCortex) -> None:
    """A request asks for the address of an idle engine; before it comes the engine has been asked to go."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(V1Neuron):
        async def _endpoint(self, request: web.Request) -> web.Response:
            response = await super()._endpoint(request)
            asked.set()
            await go_on.wait()
            return response

        async def _unload(self, request: web.Request) -> web.Response:
            go_on.set()
            polls = self.calls.count("/health")
            while self.calls.count("/health") < polls + 2:  # noqa: ASYNC110 - the address has been heard by then
                await asyncio.sleep(0.01)
            self.used_mb = [0]
            return await super()._unload(request)

    benjy = Slow("benjy", 24000)
    benjy.models, benjy.used_mb = {"org/low": "loaded"}, [20000]
    async with benjy.running():
        cortex = await start_cortex([benjy], [LOW, HIGH], placement={"min_residency_secs": 0})
        first = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(asked.wait())
        assert await bounded(_status(cortex.chat("org/high"))) == 200
        models = [json.loads(body)["model"] for _, _, body in benjy.engine.requests]
        assert models == ["org/high"], "the other waits for its turn"
        first.cancel()


async def test_an_accepted_load_counts_before_its_first_event(start_cortex: StartCortex) -> None:
    """Events have a connection of their own, and may come late: meanwhile nothing is loaded elsewhere, and an old
    failure is not taken for this load's."""
    taken = asyncio.Event()

    async def take(wire: Wire, received: Received) -> None:
        first.change("org/low", "loading")
        await wire.send(plain(b'{"status":"loading"}', status="202 Accepted"))
        taken.set()

    async with RawNeuron("first").running() as first, RawNeuron("second").running() as second:
        first.scripts["/models/load?wait=false"] = second.scripts["/models/load?wait=false"] = take
        first.change("org/low", "failed", error="long ago")
        cortex = await start_cortex([first, second], [LOW], poll={"interval_secs": 30})
        watch = cortex.parts.pollers["first"]
        await bounded(first.streaming.wait())
        while first.asked[-2:] != ["/health", "/health"]:  # while events arrive, the models are not requested
            await watch.poll()
        asking = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(taken.wait())
        await bounded(cortex.until(lambda: cortex.parts.fleet.snapshot().loading_on("org/low") is not None))
        for _ in range(2):
            await watch.refresh()
        assert [job.node for job in cortex.parts.loader.jobs()] == ["first"]
        first.change("org/low", "failed", error="just now", cause="model")
        await first.tell("model", first.models["org/low"])
        assert await bounded(asking) == 503
        assert "/models/load?wait=false" not in second.asked


async def test_a_load_waits_for_the_end_of_the_engine_before(start_cortex: StartCortex) -> None:
    """A neuron that still stops an engine of the model accepts the load and lists the model as stopping until then."""
    taken = asyncio.Event()

    async def take(wire: Wire, received: Received) -> None:
        await wire.send(plain(b'{"status":"loading"}', status="202 Accepted"))
        taken.set()

    async with RawNeuron().running() as neuron:
        neuron.scripts["/models/load?wait=false"] = take
        neuron.change("org/low", "unloaded", state="stopping")
        cortex = await start_cortex([neuron], [LOW])
        await bounded(neuron.streaming.wait())
        asking = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(taken.wait())
        for _ in range(3):
            await cortex.parts.pollers["raw"].refresh()
        assert [job.node for job in cortex.parts.loader.jobs()] == ["raw"]
        neuron.change("org/low", "failed", error="just now", cause="model")
        await neuron.tell("model", neuron.models["org/low"])
        assert await bounded(asking) == 503
        assert neuron.asked.count("/models/load?wait=false") == 1


async def test_a_load_of_another_client_clears_the_backoff(start_cortex: StartCortex) -> None:
    """A model that has loaded since has no backoff: after it is unloaded it can be loaded at once."""

    async def fail(wire: Wire, received: Received) -> None:
        error = b'{"error":{"message":"no such file","code":"load_failed","cause":"model"}}'
        await wire.send(plain(error, status="500 Internal Server Error"))

    async def no_address(wire: Wire, received: Received) -> None:
        await wire.send(plain(b'{"error":"none"}', status="404 Not Found"))

    async with RawNeuron().running() as neuron:
        neuron.scripts["/models/load?wait=false"] = fail
        neuron.scripts["/models/org%2Flow/endpoint"] = no_address
        cortex = await start_cortex([neuron], [LOW])
        await bounded(neuron.streaming.wait())
        view = cortex.parts.scheduler.view
        assert await bounded(_status(cortex.chat("org/low"))) == 503
        assert view().backoff("org/low", "raw") is not None
        neuron.change("org/low", "loading")
        await neuron.tell("model", neuron.models["org/low"])
        await bounded(cortex.until(lambda: view().fleet.loading_on("org/low") is not None))
        asking = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(_until(lambda: cortex.parts.queue.count("org/low") == 1))
        neuron.change("org/low", "loaded")
        await neuron.tell("model", neuron.models["org/low"])
        assert await bounded(asking) == 502, "it has no engine"
        left = view().backoff("org/low", "raw")
        assert left is None or left.temporary, "but for the moment that the lost engine costs"


async def test_replica_control_waits_for_the_first_poll_of_each_neuron(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of cortex, a replica is not considered missing while its neuron has not answered yet."""
    monkeypatch.setattr(scheduler, "SAMPLE_SECS", 0.02)
    benjy.models["org/kept"] = "loaded"
    benjy.answers.clear()
    kept = {"id": "org/kept", "vram_mb": 4000, "replicas": {"min": 1}}
    slow = {"timeout_secs": 30, "interval_secs": 0.05}
    cortex = await start_cortex([benjy, beast], [kept], wait_healthy=False, poll=slow)
    await bounded(_until(lambda: beast.calls.count("/health") > 5))
    benjy.answers.set()
    await bounded(cortex.until(lambda: bool(cortex.parts.fleet.snapshot().serving("org/kept"))))
    assert not beast.loads


async def test_no_request_is_refused_before_a_new_neuron_is_polled(start_cortex: StartCortex, beast: V1Neuron) -> None:
    """The only neuron is replaced by another: what waits for a place on the first is loaded on the second."""
    benjy = V1Neuron("benjy", 24000)
    benjy.load_gate.clear()
    async with benjy.running():
        cortex = await start_cortex([benjy], [LOW])
        waiting = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(benjy.load_started.wait())
        parts, entry = cortex.parts, NeuronEntry(name="beast", endpoint=beast.url)
        parts.fleet.configure([("beast", beast.url)], unhealthy_after=3)
        parts.membership.configure([entry], parts.config.poll)
        assert await bounded(waiting) == 200
        assert [load["model_id"] for load in beast.loads] == ["org/low"]


async def test_a_failed_removal_is_not_retried_at_once(
    start_cortex: StartCortex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves on, instead of being asked to go at every look."""
    monkeypatch.setattr(scheduler, "SAMPLE_SECS", 0.02)
    benjy = Stubborn("benjy", 24000)
    benjy.models["org/low"] = "loaded"
    async with benjy.running():
        cortex = await start_cortex([benjy], [{**LOW, "idle_ttl_secs": 0.01}])
        await bounded(_until(lambda: bool(benjy.unloads)))
        polls = benjy.calls.count("/health")
        await bounded(_until(lambda: benjy.calls.count("/health") > polls + 5))
        assert benjy.unloads == ["org/low"]
        assert not cortex.parts.fleet.snapshot().evicting


async def test_a_load_that_an_operator_joined_continues_without_waiting_requests(start_cortex: StartCortex) -> None:
    """The client disconnected before the model to evict had finished its requests."""
    benjy, finish = V1Neuron("benjy", 24000), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await finish.wait()
        return web.json_response({})

    benjy.models, benjy.used_mb, benjy.engine.answer = {"org/low": "loaded"}, [20000], answer
    async with benjy.running():
        impatient = {"patience_secs": 0, "min_residency_secs": 0}
        cortex = await start_cortex([benjy], [LOW, HIGH], placement=impatient)
        busy = asyncio.create_task(_status(cortex.chat("org/low")))
        await bounded(_until(lambda: bool(benjy.engine.requests)))
        waiting = asyncio.create_task(_status(cortex.chat("org/high")))
        await bounded(_until(lambda: bool(cortex.parts.loader.jobs())))
        operator = asyncio.create_task(
            _status(cortex.http.post(f"{cortex.url}/fleet/load", json={"model": "org/high"}))
        )
        (job,) = cortex.parts.loader.jobs()
        await bounded(_until(lambda: job.needed))
        waiting.cancel()
        await bounded(_until(lambda: not cortex.parts.queue.count("org/high")))
        for _ in range(3):  # as many looks at whether it is still wanted
            await asyncio.sleep(DRAIN_POLL_SECS)
        finish.set()
        assert await bounded(operator) == 200
        assert await bounded(busy) == 200


async def test_nothing_is_planned_without_waiting_requests(
    start_cortex: StartCortex, benjy: V1Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the fleet changes: reports from a thousand busy neurons do not trigger planning."""
    benjy.models["org/low"] = "loaded"
    cortex = await start_cortex([benjy], [LOW])
    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "PlanningView", None)
        for _ in range(3):
            cortex.parts.scheduler.routes_changed(["org/low"])
            await asyncio.sleep(0)
        cortex.parts.scheduler.schedule()
    assert await bounded(_status(cortex.chat("org/low"))) == 200


async def _status(request: Any) -> int:
    async with request as response:
        await response.read()
        return int(response.status)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is looked at has no event
        await asyncio.sleep(0.01)


async def test_a_neuron_that_comes_back_does_not_leave_a_model_loaded_twice(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """Its model was loaded elsewhere meanwhile. With `replicas.max` 1 the copy used least recently goes, the other
    serves."""
    cortex = await start_cortex([beast, benjy], [{"id": "org/m"}], placement={"scale_down_secs": 0.5})
    fleet = cortex.parts.fleet
    async with cortex.chat("org/m") as response:
        first = response.headers["x-cortex-node"]
    lost, other = (beast, benjy) if first == "beast" else (benjy, beast)
    lost.answers.clear()
    await cortex.until(lambda: not fleet.node(lost.name).healthy)
    async with cortex.chat("org/m") as response:
        assert response.headers["x-cortex-node"] == other.name
    lost.answers.set()
    await cortex.until(lambda: len(fleet.snapshot().serving("org/m")) == 2)
    await cortex.until(lambda: len(lost.unloads) + len(other.unloads) == 1)
    await cortex.until(lambda: len(fleet.snapshot().serving("org/m")) == 1)
    async with cortex.chat("org/m") as response:
        assert (response.status, response.headers["x-cortex-cold-start"]) == (200, "false")
    assert len(lost.loads) == len(other.loads) == 1
