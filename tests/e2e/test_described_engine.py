"""An engine that only neuron.toml describes, beside the simulation, behind one cortex and with the `openai` client."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import tomli_w
from openai import AsyncOpenAI

from tests.cortex.cortex_process import CortexProcess, cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, marked_processes, neuron_process, until
from tests.ports import free_port

__all__ = ["mark"]

ENGINE = str(Path(__file__).parents[1] / "neuron/harness/command/fake_engine.py")
FAKE, SIM = "org/described", "org/simulated"


@asynccontextmanager
async def fleet(tmp_path: Path) -> AsyncIterator[tuple[NeuronProcess, CortexProcess, AsyncOpenAI]]:
    port = free_port()
    command = [sys.executable, ENGINE, "--prefix", "/api", "--name", "{id}"]
    engine = {
        "kind": "command",
        "command": [*command, "--host", "{host}", "--port", "{port}"],
        "env": {"FAKE_KEY": "{key}"},
        "api_prefix": "/api",
        "paths": ["/v1/chat/completions"],
        "port_range": [28100, 28899],
    }
    settings = {
        **{"name": "n", "port": port, "state_dir": str(tmp_path / "state"), "recovery": {"backoff_secs": 0}},
        "harness": {"fake": engine, "sim": {"port_range": [28900, 28999], "extra_args": ["--load-secs", "0.1"]}},
        "simulate": {"devices": ["RTX 4090", "RTX 4090"]},
    }
    config = tmp_path / "neuron.toml"
    config.write_bytes(tomli_w.dumps(settings).encode())
    models = [{"id": name, "harness": harness, "vram_mb": 2000} for name, harness in ((FAKE, "fake"), (SIM, "sim"))]
    async with (
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], models) as cortex,
        AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield neuron, cortex, client


async def test_one_fleet_mixes_engines(mark: str, tmp_path: Path) -> None:
    """Cold and warm, streamed with usage, Anthropic's messages translated, and kill -9 survived."""
    async with fleet(tmp_path) as (neuron, cortex, client):
        for model in (FAKE, SIM, FAKE):
            answer = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
            assert answer.choices[0].message.content
        stream = await client.chat.completions.create(
            model=FAKE, messages=[], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two"
        assert chunks[-1].usage is not None
        async with aiohttp.ClientSession(cortex.url) as session:
            body = {"model": FAKE, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
            async with session.post("/v1/messages", json=body) as response:
                assert (response.status, (await response.json())["usage"]["output_tokens"]) == (200, 2)
            async with session.post("/v1/embeddings", json={"model": FAKE, "input": "x"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
        assert "translating" not in cortex.log()  # `paths` said so before the first request
        killed = (await neuron.model(FAKE))["pid"]
        os.kill(killed, signal.SIGKILL)
        answer = await client.chat.completions.create(model=FAKE, messages=[])
        assert answer.choices[0].message.content not in (None, f"pid {killed}")
    await until(lambda: not marked_processes(mark))
