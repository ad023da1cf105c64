"""The HTTP API: ids, tokens, logs, figures and error bodies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.protocol import Discovery, NeuronHealth
from tests.neuron.neurons import Neuron, config_of, neuron_here, until


@pytest.mark.parametrize("model_id", ["org/model", "a/b/c", "100%25@v1", "name:tag", "modèle"])
async def test_ids_in_paths(neuron: Neuron, model_id: str) -> None:
    """An id is found percent-encoded, and unencoded where it has no character that needs encoding."""
    await neuron.load(model_id, source="org/source")
    assert (await neuron.endpoint(model_id)).status == 200
    if "%" not in model_id:
        assert (await neuron.call("GET", f"/models/{model_id}/endpoint")).status == 200


async def test_discovery_and_health(neuron: Neuron) -> None:
    """/discovery and /health have the protocol's fields, name the same process, and health is live."""
    discovery = Discovery.model_validate((await neuron.call("GET", "/discovery")).body)
    assert (discovery.hostname, discovery.simulated, discovery.harnesses) == ("test", True, ["sim", "vllm"])
    assert [device.name for device in discovery.devices] == ["RTX 5090", "RTX 5090"]
    first = NeuronHealth.model_validate((await neuron.call("GET", "/health")).body)
    assert first.instance_id == discovery.instance_id
    assert len(first.devices) == 2

    async def later() -> bool:
        second = NeuronHealth.model_validate((await neuron.call("GET", "/health")).body)
        return second.uptime_secs > first.uptime_secs

    assert await until(later)


async def test_health_tells_how_busy_engines_are(neuron: Neuron) -> None:
    """Requests running and waiting in the engine are shown while they last."""
    await neuron.load("org/model", "--max-num-seqs", "1", "--tokens-per-sec", "20")
    found = (await neuron.endpoint("org/model")).body

    async def ask() -> None:
        body = {"model": "org/model", "prompt": "x", "max_tokens": 40}
        headers = {"Authorization": f"Bearer {found['api_key']}"}
        async with neuron.session.post(f"{found['url']}/v1/completions", json=body, headers=headers) as response:
            await response.read()

    async def figures() -> tuple[int, int] | None:
        told = (await neuron.call("GET", "/health")).body["models"]
        return (told[0]["in_flight"], told[0]["queue_depth"]) if told else None

    async def idle() -> bool:
        return await figures() == (0, 0)

    await until(idle)  # its first figures come a moment after the load
    asking = [asyncio.create_task(ask()) for _ in range(2)]

    async def busy() -> bool:
        return await figures() == (1, 1)

    await until(busy)
    for task in asking:
        task.cancel()
    await until(idle)


async def test_logs(neuron: Neuron) -> None:
    """The last lines, as many as asked for; an invalid number is refused; an unknown model is 404."""
    await neuron.load("org/model")
    path = "/models/org%2Fmodel/logs"
    lines = (await neuron.call("GET", path)).body["lines"]
    assert any("Application startup complete" in line for line in lines)
    assert (await neuron.call("GET", f"{path}?tail=2")).body["lines"] == lines[-2:]
    assert (await neuron.call("GET", f"{path}?tail=0")).body["lines"] == []
    for tail in ("-1", "x", "99999999", "%C2%B2"):
        answer = await neuron.call("GET", f"{path}?tail={tail}")
        assert (answer.status, answer.error["param"]) == (400, "tail")
    assert (await neuron.call("GET", "/models/nope/logs")).error["code"] == "model_not_found"


async def test_logs_are_followed_until_the_engine_is_gone(neuron: Neuron) -> None:
    """Server-sent events, one line each; for an engine that is gone the last lines, then the end."""
    await neuron.load("org/model")
    path = f"{neuron.base}/models/org%2Fmodel/logs?tail=1&follow=true"
    async with neuron.session.get(path) as response:
        assert response.content_type == "text/event-stream"
        assert (await response.content.readline()).startswith(b"data: (APIServer pid=")
    await neuron.unload("org/model")
    async with neuron.session.get(path) as response:
        assert (await asyncio.wait_for(response.read(), 5)).startswith(b"data: ")
    answer = await neuron.call("GET", "/models/org%2Fmodel/logs?follow=perhaps")
    assert (answer.status, answer.error["param"]) == (400, "follow")


async def test_key_is_not_in_the_log_nor_in_the_arguments(neuron: Neuron) -> None:
    """Only callers of /endpoint get the engine's key."""
    await neuron.load("org/model")
    key = (await neuron.endpoint("org/model")).body["api_key"]
    lines = (await neuron.call("GET", "/models/org%2Fmodel/logs")).body["lines"]
    assert key not in "\n".join(lines)
    pid = (await neuron.model("org/model"))["pid"]
    assert key not in await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_text)


async def test_errors_have_the_envelope(neuron: Neuron) -> None:
    """Every error body is an error object with message, type, code and param."""
    bad: list[tuple[str, str, dict[str, Any], int]] = [
        ("POST", "/models/load", {"data": b"{"}, 400),
        ("POST", "/models/load", {"json": {"harness": "sim"}}, 400),
        ("POST", "/models/load?wait=perhaps", {"json": {"model_id": "x", "harness": "sim"}}, 400),
        ("POST", "/models/unload", {"json": {"model_id": "nope"}}, 404),
        ("GET", "/models/nope/endpoint", {}, 404),
        ("GET", "/nope", {}, 404),
        ("DELETE", "/models", {}, 405),
    ]
    for method, path, options, status in bad:
        answer = await neuron.call(method, path, **options)
        assert answer.status == status, path
        assert set(answer.error) >= {"message", "type", "code", "param"}, path


async def test_unknown_fields_are_ignored(neuron: Neuron) -> None:
    """Fields that this neuron does not know are ignored; null equals absent."""
    body = {"model_id": "m", "harness": "sim", "quant": None, "tensor_parallel": None, "devices": None, "novelty": 1}
    assert (await neuron.call("POST", "/models/load", json=body)).status == 200


async def test_token(mark: str, tmp_path: Path) -> None:
    """With a token configured, every path requires it."""
    async with neuron_here(config_of(tmp_path / "state", token="secret")) as neuron:
        for path in ("/health", "/discovery", "/models", "/events", "/metrics", "/nope"):
            answer = await neuron.call("GET", path, headers={"Authorization": "Bearer wrong"})
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
        assert (await neuron.call("GET", "/health")).status == 200


async def test_metrics(neuron: Neuron) -> None:
    """The page has the contract's metric names with correct values."""
    await neuron.load("org/model", vram_mb=1024)
    families = text_string_to_metric_families((await neuron.call("GET", "/metrics")).body)
    samples = [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    uuid = (await neuron.call("GET", "/discovery")).body["devices"][0]["uuid"]
    used = (await neuron.call("GET", "/health")).body["devices"][0]["vram_used_mb"]
    model = {"model": "org/model"}
    for name, labels, value in (
        ("neuron_engine_state", {**model, "state": "loaded"}, 1),
        ("neuron_engine_state", {**model, "state": "failed"}, 0),
        ("neuron_engine_restarts_total", model, 0),
        ("neuron_instance_state", {**model, "engine": "0", "state": "loaded"}, 1),
        ("neuron_model_load_seconds_count", model, 1),
        ("neuron_device_memory_used_bytes", {"index": "0", "uuid": uuid}, used * 2**20),
        ("neuron_device_memory_total_bytes", {"index": "0", "uuid": uuid}, 32607 * 2**20),
        ("neuron_device_memory_free_bytes", {"index": "0", "uuid": uuid}, (32607 - used) * 2**20),
        ("neuron_engine_device_memory_bytes", {**model, "engine": "0", "index": "0", "uuid": uuid}, used * 2**20),
    ):
        assert (name, labels, value) in samples


async def test_default_models(mark: str, tmp_path: Path) -> None:
    """Default models load one after the other at start while HTTP already answers; a failure does not stop the rest."""
    models = [
        {"model_id": "first", "args": ["--load-secs", "0.5"]},
        {"model_id": "broken", "args": ["--load-secs", "0.2", "--fault", "oom-at-load"]},
        {"model_id": "wrong", "devices": [9]},
        {"model_id": "last", "harness": "sim", "args": ["--load-secs", "0.2"]},
    ]
    async with neuron_here(config_of(tmp_path / "state", default_models=models)) as neuron:

        async def activation(state: str) -> dict[str, object] | None:
            found: dict[str, object] = (await neuron.call("GET", "/health")).body["activation"]
            return found if found["state"] == state else None

        early = await activation("activating")
        assert early is not None
        assert early["in_progress"] == "first"
        assert early["pending"] == ["broken", "wrong", "last"]
        done = await until(lambda: activation("done"))
        assert (done["completed"], done["pending"], done["in_progress"]) == (["first", "last"], [], None)
        assert "out of memory" in done["failed"]["broken"]
        assert "device 9" in done["failed"]["wrong"]
        assert (await neuron.model("last"))["status"] == "loaded"


async def test_endpoint_of_a_neuron_on_all_addresses(mark: str, tmp_path: Path) -> None:
    """Bound to the wildcard address, neuron names the host by which the caller reached it, and that address works."""
    async with neuron_here(config_of(tmp_path / "state", host="0.0.0.0")) as neuron:
        await neuron.load("org/model")
        found = (await neuron.call("GET", "/models/org%2Fmodel/endpoint", headers={"Host": "localhost:7"})).body
        assert found["url"].startswith("http://localhost:28")
        async with neuron.session.get(f"{found['url']}/health") as response:
            assert response.status == 200


async def test_model_roots(mark: str, tmp_path: Path) -> None:
    """With model_roots, local models must be below one of them, links resolved; names that are not paths pass."""
    root = tmp_path / "models"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    async with neuron_here(config_of(tmp_path / "state", model_roots=[str(root)])) as neuron:
        assert (await neuron.load("a", source=str(root / "inside"))).status == 200
        assert (await neuron.load("b", source="org/name")).status == 200
        for place in (root / "link", tmp_path / "outside", Path("/etc")):
            answer = await neuron.load("c", source=str(place))
            assert (answer.status, answer.error["param"]) == (400, "source")
