"""A web page must not reach a neuron through its visitor's browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.neuron.neurons import Neuron, config_of, neuron_here

LOAD = b'{"model_id": "org/model", "harness": "sim"}'
PATHS = ("/health", "/models", "/discovery", "/events", "/metrics", "/models/org%2Fmodel/logs", "/estimate?model=m")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example:13131"},
        {"Host": "evil.example:13131", "Origin": "http://evil.example:13131", "Sec-Fetch-Site": "same-origin"},
    ],
    ids=str,
)
async def test_requests_of_web_pages_are_refused(neuron: Neuron, headers: dict[str, str]) -> None:
    """Every route, even with a JSON body: a page that rebinds DNS can send one."""
    for path in PATHS:
        answer = await neuron.call("GET", path, headers=headers)
        assert (answer.status, answer.error["code"]) == (403, "forbidden"), path
    for action in ("load", "unload", "sleep", "wake"):
        json = {**headers, "Content-Type": "application/json"}
        answer = await neuron.call("POST", f"/models/{action}", data=LOAD, headers=json)
        assert (answer.status, answer.error["code"]) == (403, "forbidden"), action
        assert "allowed_hosts" in answer.error["message"] or "allowed_origins" in answer.error["message"]
    assert await neuron.model("org/model") == {}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_a_load_must_be_json(neuron: Neuron, kind: str) -> None:
    """Other media types, which a page can send without a preflight, are refused."""
    answer = await neuron.call("POST", "/models/load", data=LOAD, headers={"Content-Type": kind})
    assert (answer.status, answer.error["code"]) == (415, "invalid_request")
    assert "application/json" in answer.error["message"]
    assert await neuron.model("org/model") == {}


async def test_hosts_that_a_cortex_uses(mark: str, tmp_path: Path) -> None:
    """Private names work without configuration, public ones when they are configured."""
    async with neuron_here(config_of(tmp_path / "state", allowed_hosts=["gpu1.example.com"])) as neuron:
        port = neuron.base.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "neuron", "beast.internal", "beast.local", "GPU1.example.com"):
            assert (await neuron.call("GET", "/health", headers={"Host": f"{host}:{port}"})).status == 200, host
        assert (await neuron.call("GET", "/health", headers={"Host": "gpu2.example.com"})).status == 403


async def test_a_token_makes_every_host_acceptable(mark: str, tmp_path: Path) -> None:
    """A page cannot know it, and cortex may reach the host under any name."""
    async with neuron_here(config_of(tmp_path / "state", token="secret")) as neuron:
        assert (await neuron.call("GET", "/health", headers={"Host": "gpu1.example.com"})).status == 200
        assert (await neuron.call("GET", "/health", headers={"Origin": "http://evil.example"})).status == 403


async def test_arguments_that_run_code_are_refused(neuron: Neuron) -> None:
    """A caller gets 400 and learns which key allows it."""
    body = {"model_id": "org/model", "harness": "vllm", "args": ["--trust-remote-code"]}
    answer = await neuron.call("POST", "/models/load", json=body)
    assert (answer.status, answer.error["param"]) == (400, "args")
    assert "allow_code = true in [harness.vllm]" in answer.error["message"]
