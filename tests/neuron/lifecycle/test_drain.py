"""Draining: what happens to running requests when an engine is to stop. With real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.neuron.lasting import MODEL, config, leaving, rewritten, streaming
from tests.neuron.neurons import NeuronProcess, marked_engines, marked_processes, neuron_process, until

__all__ = ["config"]


async def test_drain_finishes_what_runs(config: Path, mark: str) -> None:
    """unload?drain_secs=: the endpoint is withdrawn, the running stream finishes, then the engine stops."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=30) as stream:
            path = "/models/unload?drain_secs=60"
            unloading = asyncio.create_task(neuron.call("POST", path, json={"model_id": MODEL}))
            view = await neuron.until_status(MODEL, "unloaded")
            assert view["state"] == "draining"
            assert (await neuron.endpoint(MODEL)).status == 404
            assert (await stream)[-1] == b"[DONE]"
            assert (await unloading).status == 200
        assert [step["state"] for step in (await neuron.model(MODEL))["transitions"]][:3] == [
            "unloaded",
            "stopping",
            "draining",
        ]
        assert (await neuron.call("POST", "/models/unload?drain_secs=x", json={"model_id": MODEL})).status == 400


async def test_drain_is_cut_short(config: Path, mark: str) -> None:
    """A drain ends at its deadline, and at an unload without one."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "5")
        async with streaming(neuron, tokens=1000):
            body = {"model_id": MODEL}
            long = asyncio.create_task(neuron.call("POST", "/models/unload?drain_secs=3000", json=body))
            await neuron.until_status(MODEL, "unloaded")
            assert (await neuron.unload(MODEL)).status == 200
            assert (await long).status == 200


async def test_sigterm_drains_and_sends_events(config: Path, mark: str) -> None:
    """When neuron stops, listeners get an event that the model takes no new requests before their stream ends, and
    running requests finish."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=40) as stream, neuron.session.get(f"{neuron.base}/events") as events:
            assert events.status == 200
            neuron.process.terminate()
            text = (await events.content.read()).decode()
            told = [line[6:] for line in text.splitlines() if line.startswith('data: {"id"')]
            states = [json.loads(each)["state"] for each in told]
            assert states[:1] == ["draining"]
            assert (await stream)[-1] == b"[DONE]"
        assert await asyncio.wait_for(neuron.process.wait(), 20) == 0
    assert not marked_processes(mark)


async def test_drain_goes_on_when_engines_are_left(config: Path, mark: str) -> None:
    """SIGTERM with leave_engines does not cut the requests of a model that is being unloaded."""
    leaving(config)
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        async with streaming(neuron, tokens=40) as stream:
            unload = asyncio.create_task(neuron.call("POST", "/models/unload?drain_secs=30", json={"model_id": MODEL}))
            await neuron.until_status(MODEL, "unloaded")
            assert await neuron.stop() == 0
            assert len(events := await stream) >= 40
            assert events[-1] == b"[DONE]"
        assert (await unload).status == 200
    assert not marked_processes(mark)


@pytest.mark.parametrize("fault", ["no-metrics", "bare-metrics", "hanging-metrics"])
async def test_drain_without_figures_ends_when_idle(config: Path, mark: str, fault: str) -> None:
    """An engine that tells no figures is drained in seconds without a client, not in `drain_secs`."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--fault", fault)
        path = "/models/unload?drain_secs=1800"
        answer = await asyncio.wait_for(neuron.call("POST", path, json={"model_id": MODEL}), 5)
        assert answer.status == 200
        assert "drained" in {step["reason"] for step in (await neuron.model(MODEL))["transitions"]}


@pytest.mark.parametrize("fault", ["no-metrics", "bare-metrics", "hanging-metrics"])
async def test_drain_without_figures_finishes_what_runs(config: Path, mark: str, fault: str) -> None:
    """A stream of a client that went to such an engine directly finishes before the engine stops."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20", "--fault", fault)
        async with streaming(neuron, tokens=30) as stream:
            path = "/models/unload?drain_secs=60"
            unloading = asyncio.create_task(neuron.call("POST", path, json={"model_id": MODEL}))
            await neuron.until_status(MODEL, "unloaded")
            assert (await stream)[-1] == b"[DONE]"
            assert len(await stream) >= 30
        assert (await asyncio.wait_for(unloading, 5)).status == 200


@contextlib.asynccontextmanager
async def connection(neuron: NeuronProcess) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]]:
    """A connection to the model's engine of a client that is not cortex, and a request for it that keeps it open."""
    found = (await neuron.endpoint(MODEL)).body
    url, body = urlsplit(found["url"]), json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {found['api_key']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield reader, writer, (head + body).encode()
    finally:
        writer.close()


async def answer_of(reader: asyncio.StreamReader) -> bytes:
    """A complete answer with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def drained(neuron: NeuronProcess, secs: float) -> bool:
    """Unloads with a long drain; whether the model counts as drained within `secs`."""
    path = "/models/unload?drain_secs=1800"
    answer = await asyncio.wait_for(neuron.call("POST", path, json={"model_id": MODEL}), secs)
    return answer.status == 200 and "drained" in {each["reason"] for each in (await neuron.model(MODEL))["transitions"]}


async def test_drain_without_figures_finishes_an_unanswered_request(config: Path, mark: str) -> None:
    """A request whose first byte takes long is not cut, since its client sent last. Until then neuron says what it
    waits for. The connection that stays open afterwards delays the drain by seconds."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--ttft-ms", "1500", "--fault", "no-metrics")
        async with connection(neuron) as (reader, writer, request):
            writer.write(request)
            draining = asyncio.create_task(drained(neuron, 20))
            waiting = await until(lambda: "stops later" in neuron.log.read_text() or draining.done())
            assert waiting
            progress = (await neuron.model(MODEL))["progress"]
            assert progress["phase"] == "draining"
            assert progress["message"].startswith("1 connection that may have a request")
            answer = await answer_of(reader)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b'"choices"' in answer
            assert not draining.done()
            assert await draining


async def test_drain_without_figures_ignores_idle_connections(config: Path, mark: str) -> None:
    """One that was only opened does not count."""
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--fault", "no-metrics")
        async with connection(neuron):
            assert await drained(neuron, 5)


async def test_drain_ends_when_engine_hangs(config: Path, mark: str) -> None:
    """An engine that answers nothing any more, its health check included, is not waited for."""
    rewritten(config, "[simulate]", "[health]\ninterval_secs = 0.1\nunresponsive_secs = 1\n[simulate]")
    async with neuron_process(config) as neuron:
        await neuron.load(MODEL, "--tokens-per-sec", "20", "--fault", "no-metrics")
        with contextlib.suppress(aiohttp.ClientError):  # the stream is cut
            async with streaming(neuron, tokens=1000):
                path = "/models/unload?drain_secs=1800"
                unloading = asyncio.create_task(neuron.call("POST", path, json={"model_id": MODEL}))
                await neuron.until_status(MODEL, "unloaded")
                for pid in marked_engines(mark):
                    os.kill(pid, signal.SIGSTOP)
                assert (await asyncio.wait_for(unloading, 10)).status == 200
        reasons = {step["reason"] for step in (await neuron.model(MODEL))["transitions"]}
        assert "unhealthy" in reasons
