"""An engine gets SIGTERM from outside its neuron: it closes its socket before it exits."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp

from tests.cortex.cortex_process import cortex_process
from tests.e2e.eviction.test_eviction_memory import Address
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.neuron.sim_process import free_port

__all__ = ["mark"]

MODEL = "org/model"
EVERY_SECS, SECS = 0.03, 1.5


async def test_requests_wait_for_the_next_engine(mark: str, tmp_path: Path) -> None:
    """Connections are refused while the neuron still reports the model as loaded: requests wait for the next engine."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [Address(port)], [{"id": MODEL, "harness": "sim", "vram_mb": 4000}]) as cortex,
    ):

        async def ask(tokens: int = 1, *, stream: bool = False) -> tuple[int, str]:
            body = {"model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
            async with http.post(f"{cortex.url}/v1/completions", json=body) as response:
                return response.status, await response.text() if response.status != 200 else ""

        assert await ask() == (200, "")
        under_way = [asyncio.create_task(ask(2000, stream=True)) for _ in range(20)]
        await asyncio.sleep(EVERY_SECS)
        os.kill((await neuron.model(MODEL))["pid"], signal.SIGTERM)
        asked = []
        for _ in range(int(SECS / EVERY_SECS)):
            await asyncio.sleep(EVERY_SECS)  # paces the load
            asked.append(asyncio.create_task(ask()))
        assert [answer for answer in await asyncio.gather(*asked) if answer != (200, "")] == []
        await asyncio.gather(*under_way)
