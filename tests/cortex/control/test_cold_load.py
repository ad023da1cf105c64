"""Loading on request, against protocol v1 neurons."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, answering, plain
from tests.cortex.raw_http import Wire, until
from tests.cortex.raw_neuron import RawNeuron

SMALL = {"id": "org/small", "vram_mb": 4000}
LARGE = {"id": "org/large", "vram_mb": 50000, "min_devices": 2, "min_device_vram_mb": 30000, "quant": "fp8"}


async def test_first_request_loads_where_it_fits_and_streams_back(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """The neuron is told tensor parallelism, devices and quantisation; the answer says where it came from."""
    cortex = await start_cortex([benjy, beast], [SMALL, LARGE])
    async with cortex.chat("org/large") as response:
        assert response.status == 200
        assert response.headers["x-cortex-node"] == "beast"
        assert response.headers["x-cortex-cold-start"] == "true"
    (load,) = beast.loads
    assert load["tensor_parallel"] == 2
    assert load["devices"] == [0, 1]
    assert load["quant"] == "fp8"
    assert load["harness"] == "vllm"
    assert not benjy.loads
    async with cortex.chat("org/large") as response:
        assert response.headers["x-cortex-cold-start"] == "false"


async def test_a_request_is_told_of_no_older_load(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """As the phases of its own: what it waited for may have been the load of another cortex."""
    cortex = await start_cortex([benjy], [SMALL])
    before = time.monotonic()
    async with cortex.chat("org/small") as response:
        assert response.status == 200
    await cortex.until(lambda: not cortex.parts.loader.jobs())
    phases = cortex.parts.loader.phases
    assert phases("org/small", "benjy", since=before)
    assert phases("org/small", "benjy", since=time.monotonic()) == ()


async def test_single_device_models_are_sent_null_tensor_parallel(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """They are loaded on the tightest fit, so that the big cards stay free."""
    cortex = await start_cortex([beast, benjy], [SMALL])
    async with cortex.chat("org/small") as response:
        assert response.status == 200
    (load,) = benjy.loads
    assert load["tensor_parallel"] is None
    assert load["devices"] == [0]


async def test_fifty_first_requests_cause_one_load(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Concurrent requests cause a single load, and all are served."""
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], [SMALL])
    asks = [asyncio.create_task(_status(cortex.chat("org/small"))) for _ in range(50)]
    await benjy.load_started.wait()
    benjy.load_gate.set()
    assert await asyncio.gather(*asks) == [200] * 50
    assert len(benjy.loads) == 1


async def test_load_outlives_the_client_that_asked(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """A client that leaves during a load cancels nothing: the next one finds the model there."""
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], [SMALL])
    ask = asyncio.create_task(_status(cortex.chat("org/small")))
    await benjy.load_started.wait()
    ask.cancel()
    await asyncio.gather(ask, return_exceptions=True)
    benjy.load_gate.set()
    async with cortex.chat("org/small") as response:
        assert response.status == 200
    assert len(benjy.loads) == 1


async def test_entry_counts_as_loaded_before_the_next_poll(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The second request is served without a second load, although polls are an hour apart here."""
    cortex = await start_cortex([benjy], [SMALL], poll={"interval_secs": 3600})
    for _ in range(2):
        async with cortex.chat("org/small") as response:
            assert response.status == 200
    assert len(benjy.loads) == 1


async def test_the_next_model_does_not_count_on_memory_that_the_last_load_took(
    start_cortex: StartCortex, benjy: V1Neuron
) -> None:
    """Two models by turns on a card with room for one: each evicts the other, although polls are an hour apart here."""

    def memory_of_loaded(answer: Any) -> Any:
        if "uptime_secs" in answer:
            answer["devices"][0] |= {"vram_used_mb": 20000 * len(benjy.models)}
            answer["devices"][0] |= {"vram_free_mb": 24000 - 20000 * len(benjy.models)}
        return answer

    benjy.rewrite = memory_of_loaded
    models = [{"id": name, "vram_mb": 20000, "min_residency_secs": 0} for name in ("org/a", "org/b")]
    cortex = await start_cortex([benjy], models, poll={"interval_secs": 3600})
    for name in ("org/a", "org/b", "org/a", "org/b"):
        assert await _status(cortex.chat(name)) == 200
        assert list(benjy.models) == [name]
    assert benjy.unloads == ["org/a", "org/b", "org/a"]
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        page = await response.text()
    assert 'cortex_displacements_total{model="org/a",node="benjy",reason="swap"} 2.0' in page
    assert 'cortex_cold_start_phase_seconds_count{model="org/a",node="benjy",phase="evicting"} 1.0' in page
    assert 'cortex_request_wait_seconds_count{model="org/b",node="benjy"} 2.0' in page
    assert 'cortex_node_poll_seconds_count{node="benjy"} ' in page


async def test_unloaded_model_of_the_neuron_is_loaded_again_there(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """A model that a neuron knows but unloaded goes back there, though another node would fit more tightly."""
    beast.models["org/small"] = "unloaded"
    cortex = await start_cortex([beast, benjy], [SMALL])
    async with cortex.chat("org/small") as response:
        assert response.headers["x-cortex-node"] == "beast"
    assert not benjy.loads


async def test_model_outside_the_catalogue_is_loaded_with_the_remembered_spec(
    start_cortex: StartCortex, benjy: V1Neuron
) -> None:
    """A model known only to a protocol v1 neuron is loaded with what the neuron lists for it."""
    benjy.models["own/model"] = "unloaded"
    cortex = await start_cortex([benjy], [])
    async with cortex.chat("own/model") as response:
        assert response.status == 200
    assert {key: value for key, value in benjy.loads[0].items() if value} == {
        "model_id": "own/model",
        "harness": "vllm",
        "devices": [0],
    }


async def test_operator_joins_the_load_of_a_request(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """`POST /fleet/load` of a model that is being loaded waits for it; nothing is placed elsewhere."""
    benjy.load_gate.clear()
    cortex = await start_cortex([beast, benjy], [{"id": "org/small", "vram_mb": 20000}])
    ask = asyncio.create_task(_status(cortex.chat("org/small")))
    await benjy.load_started.wait()
    load = cortex.http.post(f"{cortex.url}/fleet/load", json={"model": "org/small"})
    operator = asyncio.create_task(_status(load))
    async with cortex.http.post(f"{cortex.url}/fleet/load?wait=false", json={"model": "org/small"}) as response:
        assert (response.status, (await response.json())["node"]) == (202, "benjy")
    benjy.load_gate.set()
    assert set(await asyncio.gather(ask, operator)) == {200}
    assert (len(benjy.loads), len(beast.loads)) == (1, 0)


@pytest.mark.parametrize("status", ["loading", "reloading", "recovering"])
async def test_a_request_waits_for_a_load_in_progress(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, status: str
) -> None:
    """A load started by another client counts: nothing is placed elsewhere or loaded twice."""
    beast.models["org/small"] = status
    cortex = await start_cortex([beast, benjy], [SMALL])
    ask = asyncio.create_task(_status(cortex.chat("org/small")))
    polls = beast.calls.count("/models")
    await cortex.until(lambda: beast.calls.count("/models") > polls + 1)
    assert not ask.done()
    beast.models["org/small"] = "loaded"
    assert await ask == 200
    assert not beast.loads
    assert not benjy.loads


async def test_unknown_status_is_not_servable(start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron) -> None:
    """A neuron of a later version says something new: the model is placed elsewhere or again, not routed to."""
    benjy.models["org/small"] = "hibernating"
    cortex = await start_cortex([beast, benjy], [SMALL])
    async with cortex.chat("org/small") as response:
        assert response.status == 200
    assert len(beast.loads) + len(benjy.loads) == 1


@pytest.mark.parametrize("status", [400, 409])
async def test_already_loaded_is_success(start_cortex: StartCortex, benjy: V1Neuron, status: int) -> None:
    """A protocol v1 neuron answers 400 'already loaded' for a loaded model: cortex serves it."""
    benjy.load_error = status, {"error": "model org/small is already loaded"}
    cortex = await start_cortex([benjy], [SMALL], poll={"interval_secs": 3600})
    benjy.models["org/small"] = "loaded"
    async with cortex.chat("org/small") as response:
        assert response.status == 200


async def test_a_request_waits_for_a_load_of_another_client(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The neuron is loading the model with another spec, unknown to cortex so far: no failure, a wait."""
    benjy.load_error = 409, {"error": {"message": "being loaded with another quant", "code": "load_in_progress"}}
    cortex = await start_cortex([benjy], [SMALL])
    ask = asyncio.create_task(_status(cortex.chat("org/small")))
    await benjy.load_started.wait()
    benjy.models["org/small"] = "loading"
    polls = benjy.calls.count("/models")
    await cortex.until(lambda: benjy.calls.count("/models") > polls + 1)
    assert not ask.done()
    benjy.models["org/small"] = "loaded"
    assert await ask == 200


async def test_failed_load_says_why_and_is_not_repeated_at_once(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The error is 503 cold_load_failed with the neuron's reason; within the backoff the neuron is not asked again."""
    benjy.load_error = 500, {"error": {"message": "torch.OutOfMemoryError: CUDA out of memory", "code": "load_failed"}}
    cortex = await start_cortex([benjy], [SMALL])
    for _ in range(3):
        async with cortex.chat("org/small") as response:
            error = (await response.json())["error"]
            assert response.status == 503
            assert error["code"] == "cold_load_failed"
            assert "CUDA out of memory" in error["message"]
            assert 1 <= int(response.headers["Retry-After"]) <= 10
    assert len(benjy.loads) == 1


@pytest.mark.parametrize(("cause", "status"), [("node", 200), ("model", 503), (None, 503)])
async def test_refused_spec_is_tried_elsewhere_when_that_may_help(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron, cause: str | None, status: int
) -> None:
    """A 400 whose cause is the node's (a path that is outside of its roots) says nothing of other nodes. Without a
    cause it is the model's, which would be refused everywhere."""
    error = {"message": "no such path here", "code": "invalid_request", **({"cause": cause} if cause else {})}
    benjy.load_error = 400, {"error": error}
    cortex = await start_cortex([benjy, beast], [SMALL])
    assert await _status(cortex.chat("org/small")) == status
    assert (len(benjy.loads), len(beast.loads)) == (1, 1 if status == 200 else 0)


async def test_load_without_memory_is_a_failed_load(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """409 insufficient_vram is neither "already loaded" nor a load to wait for: 503 with the neuron's figures, and the
    neuron is not asked again at once."""
    figures = "'org/small' needs 4000 MiB on one device; device 0 (RTX 4090): 3100 of 24564 MiB available"
    benjy.load_error = 409, {"error": {"message": figures, "code": "insufficient_vram", "devices": [{"index": 0}]}}
    cortex = await start_cortex([benjy], [SMALL], poll={"interval_secs": 3600})
    for _ in range(2):
        async with cortex.chat("org/small") as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "cold_load_failed")
            assert figures in error["message"]
            assert "Retry-After" in response.headers
    assert len(benjy.loads) == 1


async def test_load_that_takes_too_long_is_given_up(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """`cold_load.timeout_secs` ends the wait with cold_load_failed."""
    benjy.load_gate.clear()
    cortex = await start_cortex([benjy], [SMALL], cold_load={"timeout_secs": 0.2})
    async with cortex.chat("org/small") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "cold_load_failed"


async def test_an_operators_load_ignores_the_backoff(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """`POST /fleet/load` after a failure tries again at once, and requests are served then."""
    benjy.load_error = 500, {"error": "no"}
    cortex = await start_cortex([benjy], [SMALL])
    assert await _status(cortex.chat("org/small")) == 503
    benjy.load_error = None
    async with cortex.http.post(f"{cortex.url}/fleet/load", json={"model": "org/small"}) as response:
        assert response.status == 200
        assert (await response.json())["node"] == "benjy"
    assert await _status(cortex.chat("org/small")) == 200


async def test_operator_unloads(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """`POST /fleet/unload` unloads the model wherever it is loaded; if it is loaded on no node, the answer is 404."""
    benjy.models["org/small"] = "loaded"
    cortex = await start_cortex([benjy], [SMALL])
    for expected in (200, 404):
        async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": "org/small"}) as response:
            assert response.status == expected
    assert benjy.unloads == ["org/small"]


async def test_a_starting_cortex_polls_before_it_loads(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """A request that comes before a neuron was asked waits for its answer: the model may be loaded there."""
    beast.models["org/small"] = "loaded"
    beast.answers.clear()
    cortex = await start_cortex([beast, benjy], [SMALL], wait_healthy=False, poll={"timeout_secs": 10})
    await cortex.until(lambda: len(cortex.parts.fleet.snapshot().healthy) == 1)
    asking = asyncio.create_task(_status(cortex.chat("org/small")))
    await asyncio.wait({asking}, timeout=0.3)
    assert not asking.done()
    beast.answers.set()
    assert await asking == 200
    assert (beast.loads, benjy.loads) == ([], [])


async def test_a_starting_cortex_does_not_wait_for_a_neuron_that_is_down(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """One missed poll is enough."""
    beast.silent = True
    cortex = await start_cortex([beast, benjy], [SMALL], wait_healthy=False, poll={"timeout_secs": 0.2})
    async with cortex.chat("org/small") as response:
        assert (response.status, response.headers["x-cortex-node"]) == (200, "benjy")


async def _status(request: object) -> int:
    async with request as response:  # type: ignore[attr-defined]
        await response.read()
        return int(response.status)


async def test_a_model_that_starts_to_wake_late(start_cortex: StartCortex) -> None:
    """The model may still be falling asleep: being listed as asleep meanwhile does not fail the load."""
    async with RawNeuron().running() as neuron:
        neuron.change("org/small", "sleeping")

        async def wake(wire: Wire, received: Received) -> None:
            before = neuron.asked.count("/health")
            await until(lambda: neuron.asked.count("/health") >= before + 2)
            neuron.change("org/small", "loaded")
            await wire.send(plain(b'{"status": "loaded"}'))

        async def begin(wire: Wire, received: Received) -> None:
            await wire.send(plain(b'{"status": "loading"}', status="202 Accepted"))

        neuron.scripts.update({"/models/load": wake, "/models/load?wait=false": begin})
        cortex = await start_cortex([neuron], [SMALL])
        async with cortex.http.post(f"{cortex.url}/fleet/load", json={"model": "org/small"}) as response:
            assert response.status == 200, await response.text()


async def test_a_neuron_that_loses_its_loads_is_not_asked_forever(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Its answer to a load is that it has the model already, which it does not list as loaded."""
    benjy.models["org/small"] = "stopping"
    benjy.load_error = (400, {"error": "the model is already loaded"})
    cortex = await start_cortex([benjy], [SMALL])
    ask = asyncio.create_task(_status(cortex.chat("org/small")))
    await benjy.load_started.wait()
    polls = benjy.calls.count("/health")
    await cortex.until(lambda: benjy.calls.count("/health") > polls + 5)
    assert len(benjy.loads) == 1
    benjy.models["org/small"] = "loaded"
    assert await ask == 200


async def test_an_idle_model_that_others_use_stays(start_cortex: StartCortex) -> None:
    """Another cortex's requests came as it was told to sleep: it is not unloaded instead."""
    async with RawNeuron().running() as neuron:
        neuron.change("org/small", "loaded")
        busy = b'{"error": {"message": "it has requests", "code": "model_busy"}}'

        async def gone(wire: Wire, received: Received) -> None:
            neuron.change("org/small", "unloaded")
            await wire.send(plain(b'{"status": "unloaded"}'))

        neuron.scripts["/models/sleep"] = answering(plain(busy, status="409 Conflict"))
        neuron.scripts.update({"/models/unload": gone, "/models/unload?drain_secs=1800": gone})
        await start_cortex([neuron], [{**SMALL, "idle_ttl_secs": 0.1, "when_idle": "sleep"}])
        await until(lambda: neuron.asked.count("/models/sleep") > 1)
        assert not [path for path in neuron.asked if path.startswith("/models/unload")]


async def test_a_load_brings_the_endpoint_with_it(start_cortex: StartCortex) -> None:
    """A neuron that sends the engine's endpoint with the model's status is not asked for it again."""
    async with RawEngine().running() as engine, RawNeuron().running() as neuron:
        engine.script = answering(plain(b"{}"))
        cortex = await start_cortex([neuron], [SMALL])

        async def load(wire: Wire, received: Received) -> None:
            await wire.send(plain(b'{"status": "loading"}', status="202 Accepted"))
            endpoint = {"url": engine.url, "api_key": "secret-of-the-engine"}
            neuron.change("org/small", "loaded", endpoint=endpoint)
            await neuron.tell("model", neuron.models["org/small"])

        neuron.scripts["/models/load?wait=false"] = load
        async with cortex.chat("org/small") as response:
            assert response.status == 200
            assert response.headers["x-cortex-cold-start"] == "true"
        assert dict(engine.requests[-1].headers)["authorization"] == "Bearer secret-of-the-engine"
        assert not [path for path in neuron.asked if path.endswith("/endpoint")]
        async with cortex.http.get(f"{cortex.url}/fleet") as response:
            assert "secret-of-the-engine" not in await response.text()
