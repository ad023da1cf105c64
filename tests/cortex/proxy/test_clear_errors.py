"""What is wrong with a request is said in the error: each mistake has its own message."""

from __future__ import annotations

import json

import aiohttp
import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import connected

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    return await start_cortex([benjy], [{"id": "org/small"}, {"id": "Qwen/Qwen3-8B"}], aliases={"large": "org/small"})


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b"", "application/json", "the body is empty"),
        (b" \n", "application/json", "the body is empty"),
        (b"", FORM, "the body is empty"),
        (b"model=org%2Fsmall&n=1", FORM, "the body is form-encoded"),
        (b'[{"model": "org/small"}]', "application/json", "the body is a list"),
        (b'"model"', "application/json", "the body is a string"),
        (b"5", "application/json", "the body is a number"),
        (b"null", "application/json", "the body is null"),
        (b'{"model": 5}', "application/json", "'model' must be a string, got a number"),
        (b'{"model": ["a"]}', "application/json", "'model' must be a string, got a list"),
        (b'{"model": "a"', "application/json", "the body is not valid JSON"),
        (b'{"model": "\xff"}', "application/json", "the body is not valid UTF-8"),
        (b"{}", "application/json", "the body must have a string 'model'"),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ny\r\n--x--\r\n', MULTIPART, "no complete part"),
        (b"", MULTIPART, "no complete part named 'model'"),
    ],
)
async def test_bodies(cortex: RunningCortex, body: bytes, content_type: str, said: str) -> None:
    """400 invalid_request, with the mistake in the message."""
    url = f"{cortex.url}/v1/chat/completions"
    async with cortex.http.post(url, data=body, headers={"Content-Type": content_type}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "invalid_request")
    assert said in error["message"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("org/smal", "'org/small'"), ("small", "'org/small'"), ("qwen3-8b", "'Qwen/Qwen3-8B'"), ("larg", "'large'")],
)
async def test_a_mistyped_model(cortex: RunningCortex, name: str, meant: str) -> None:
    """The 404 names close ids and aliases, and where the list is; that of one model does too."""
    async with cortex.chat(name) as response:
        said = (await response.json())["error"]["message"]
    assert response.status == 404
    assert said.startswith(f"the model {name!r} does not exist; did you mean {meant}")
    assert "GET /v1/models" in said
    async with cortex.http.get(f"{cortex.url}/v1/models/{name}") as response:
        assert meant in (await response.json())["error"]["message"]


async def test_an_unknown_model_without_a_close_name(cortex: RunningCortex) -> None:
    """No guess is made."""
    async with cortex.chat("zzz") as response:
        said = (await response.json())["error"]["message"]
    assert said == "the model 'zzz' does not exist. GET /v1/models lists all models"


async def test_other_methods(cortex: RunningCortex) -> None:
    """405 lists the allowed methods in the text and in Allow."""
    for path, allowed in (("/v1/chat/completions", "POST"), ("/fleet", "GET, HEAD")):
        async with cortex.http.delete(f"{cortex.url}{path}") as response:
            error = (await response.json())["error"]
        assert (response.status, response.headers["Allow"]) == (405, allowed)
        assert error["message"] == f"DELETE is not allowed for {path}; allowed: {allowed}"


async def test_realtime_without_a_websocket(cortex: RunningCortex) -> None:
    """426, as the path exists and needs an upgrade."""
    async with cortex.http.get(f"{cortex.url}/v1/realtime?model=org/small") as response:
        assert (response.status, response.headers["Upgrade"]) == (426, "websocket")
        assert "WebSocket" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_requests_that_cortex_does_not_speak(cortex: RunningCortex, data: bytes, status: int) -> None:
    """The type follows the status, the code says whose fault it is."""
    async with connected(cortex.url) as client:
        answer = await client.ask(data)
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["type"], error["code"]) == (status, "api_error", "invalid_request")


async def test_no_answer_of_cortex_names_a_server(cortex: RunningCortex) -> None:
    """Neither the worker nor the control nor the metrics page: versions help attackers only."""
    async with aiohttp.ClientSession() as http:
        for url in (f"{cortex.url}/health", f"{cortex.url}/nothing", f"{cortex.url}/v1/models", cortex.metrics_url):
            async with http.get(url) as response:
                assert "Server" not in response.headers, url


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/v1/messages/batches", "batches"),
        ("GET", "/v1/messages/batches/msgbatch_1/results", "batches"),
        ("POST", "/v1/batches", "batches"),
        ("GET", "/v1/files", "files"),
        ("POST", "/v1/conversations", "conversations"),
    ],
)
async def test_what_only_a_server_with_a_store_has(cortex: RunningCortex, method: str, path: str, what: str) -> None:
    """The base URL alone would be no help."""
    body = {"requests": [{"custom_id": "a", "params": {"model": "org/small"}}]} if method == "POST" else None
    async with cortex.http.request(method, f"{cortex.url}{path}", json=body) as answer:
        assert answer.status == 404
        assert f"cortex has no {what}, so send each request by itself" in (await answer.json())["error"]["message"]
