"""Every row of the contract's table of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from tests.cortex.conftest import StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

SMALL = {"id": "org/small", "vram_mb": 4000}
HUGE = {"id": "org/huge", "min_devices": 8}


async def check(
    response: aiohttp.ClientResponse, status: int, code: str, *, retry: bool, kind: str | None = None
) -> dict[str, Any]:
    """Checks status, envelope and Retry-After of an error. Returns the error."""
    error: dict[str, Any] = (await response.json())["error"]
    assert (response.status, error["code"]) == (status, code)
    assert ("Retry-After" in response.headers) is retry
    assert set(error) >= {"message", "type", "code", "param"}
    assert error["type"] == (kind or ("invalid_request_error" if status < 500 else "api_error"))
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no",
        b"[]",
        b'"model"',
        b"{}",
        b'{"model": 1}',
        b'{"model": ""}',
        b'{"model": null}',
        b'{"model": "a"',
        b'{"model": "a",}',
        b'{"model": "a"} x',
        b'{"a": {"model": "org/small"}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
    ],
)
async def test_body_without_a_model_is_invalid(start_cortex: StartCortex, benjy: V1Neuron, body: bytes) -> None:
    """400 invalid_request for any body that is not a JSON object with a string `model`."""
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.http.post(f"{cortex.url}/v1/chat/completions", data=body) as response:
        await check(response, 400, "invalid_request", retry=False)


async def test_unknown_model(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The error is 404 model_not_found, in Anthropic's shape on /v1/messages."""
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.chat("org/unknown") as response:
        await check(response, 404, "model_not_found", retry=False)
    async with cortex.http.post(f"{cortex.url}/v1/messages", json={"model": "org/unknown"}) as response:
        body = await response.json()
        assert body["type"] == "error"
        assert body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "model",
    [
        HUGE,
        {"id": "org/huge", "min_device_vram_mb": 80000},
        {"id": "org/huge", "harness": "other"},
        {"id": "org/huge", "pinned_on": ["nowhere"]},
    ],
)
async def test_infeasible_model(start_cortex: StartCortex, benjy: V1Neuron, model: dict[str, Any]) -> None:
    """404 no_feasible_neuron, with each neuron's reason; /v1/models does not list such a model."""
    cortex = await start_cortex([benjy], [model, SMALL])
    async with cortex.chat("org/huge") as response:
        error = await check(response, 404, "no_feasible_neuron", retry=False)
        assert "benjy" in error["message"]
    async with cortex.http.get(f"{cortex.url}/v1/models") as response:
        assert [entry["id"] for entry in (await response.json())["data"]] == ["org/small"]


async def test_vram_mb_never_makes_a_model_infeasible(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It is an estimate, so cortex tries to load the model."""
    cortex = await start_cortex([benjy], [{"id": "org/small", "vram_mb": 999_999}])
    async with cortex.chat("org/small") as response:
        assert response.status == 200


async def test_feasible_neuron_is_down(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """503 neuron_unavailable while the only neuron that could hold the model is down."""
    async with V1Neuron("beast", 32000, 32000).running() as beast:
        cortex = await start_cortex([benjy, beast], [{"id": "org/large", "min_devices": 2}])
    await cortex.until(lambda: not cortex.parts.fleet.snapshot().nodes["beast"].healthy)
    async with cortex.chat("org/large") as response:
        await check(response, 503, "neuron_unavailable", retry=True)
    async with cortex.http.get(f"{cortex.url}/health") as response:
        assert response.status == 200
        assert await response.json() == {"status": "degraded", "nodes": {"healthy": 1, "total": 2}}


async def test_no_healthy_neuron(start_cortex: StartCortex) -> None:
    """The error is 503 no_healthy_neurons, and /health answers 503."""
    dead = V1Neuron("dead")
    dead.url = "http://127.0.0.1:9"
    cortex = await start_cortex([dead], [SMALL], wait_healthy=False)
    async with cortex.chat("org/small") as response:
        await check(response, 503, "no_healthy_neurons", retry=True)
    async with cortex.http.get(f"{cortex.url}/health") as response:
        assert response.status == 503


async def test_no_endpoint(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """502 endpoint_unresolved when the neuron reports the model as loaded but gives no usable endpoint."""
    benjy.models["org/small"] = "loaded"
    benjy.engine_url = "nonsense"
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.chat("org/small") as response:
        await check(response, 502, "endpoint_unresolved", retry=False)


async def test_neuron_that_restarts_is_waited_for(start_cortex: StartCortex) -> None:
    """While a neuron restarts and does not count as down yet, a request whose engine only it can name waits and is
    answered."""
    neuron = V1Neuron("n", 24_000)
    neuron.models["org/small"] = "loaded"
    async with neuron.running():
        cortex = await start_cortex([neuron], [SMALL], poll={"interval_secs": 3})
        port = int(neuron.url.rpartition(":")[2])

    async def status() -> int:
        async with cortex.chat("org/small") as response:
            return int(response.status)

    asking = asyncio.create_task(status())
    await cortex.until(lambda: cortex.parts.fleet.snapshot().nodes["n"].misses > 0)
    assert not asking.done()
    async with neuron.running(port):
        assert await asking == 200


async def test_engine_unreachable(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The error is 502 upstream_unreachable if no other replica exists."""
    benjy.models["org/small"] = "loaded"
    benjy.engine_url = "http://127.0.0.1:9"
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.chat("org/small") as response:
        await check(response, 502, "upstream_unreachable", retry=False)


async def test_body_over_the_limit(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The error is 413 request_too_large; a body just below the limit passes."""
    benjy.models["org/small"] = "loaded"
    cortex = await start_cortex([benjy], [SMALL], gateway={"max_body_mib": 1})
    async with cortex.chat("org/small", pad="x" * (1 << 20)) as response:
        await check(response, 413, "request_too_large", retry=False)
    async with cortex.chat("org/small", pad="x" * ((1 << 20) - 500)) as response:
        assert response.status == 200


async def test_unknown_path_and_method(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """aiohttp's own errors have the envelope too."""
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.http.get(f"{cortex.url}/v1/nothing") as response:
        await check(response, 404, "not_found", retry=False)
    async with cortex.http.get(f"{cortex.url}/v1/chat/completions") as response:
        await check(response, 405, "method_not_allowed", retry=False)
