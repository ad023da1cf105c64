"""An engine is stopped, or its core is killed, from outside its neuron: requests wait for the next engine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.neuron.sim_process import core_of
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/model"
EVERY_SECS, SECS = 0.03, 1.5


_PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
}
_LONG = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.mark.parametrize("core", [False, True])
async def test_requests_wait_for_the_next_engine(mark: str, tmp_path: Path, core: bool) -> None:
    """The neuron still reports the model as loaded. After SIGTERM the engine closes its port before it exits; the
    server of a killed core answers every request with 500 first. Requests that have heard nothing yet wait for the next
    engine."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], [{"id": MODEL, "harness": "sim", "vram_mb": 4000}]) as cortex,
    ):

        async def ask(path: str, fields: dict[str, Any], *, stream: bool = False) -> tuple[int, str]:
            async with http.post(cortex.url + path, json={"model": MODEL, "stream": stream, **fields}) as response:
                text = await response.text()
                return response.status, text if response.status != 200 or re.search('"error": ?{', text) else ""

        assert await ask("/v1/completions", _PLAIN["/v1/completions"]) == (200, "")
        under_way = [asyncio.create_task(ask("/v1/completions", _LONG, stream=True)) for _ in range(20)]
        plain = [asyncio.create_task(ask("/v1/completions", _LONG)) for _ in range(20 if core else 0)]
        await asyncio.sleep(EVERY_SECS)
        engine = (await neuron.model(MODEL))["pid"]
        if core:
            os.kill(core_of(engine), signal.SIGKILL)
        else:
            os.kill(engine, signal.SIGTERM)
        asked = []
        for number in range(int(SECS / EVERY_SECS)):
            await asyncio.sleep(EVERY_SECS)  # paces the load
            path = list(_PLAIN)[number % len(_PLAIN)]
            streamed = path != "/v1/messages/count_tokens" and number % 2 == 0
            asked.append(asyncio.create_task(ask(path, _PLAIN[path], stream=streamed)))
        assert [answer for answer in await asyncio.gather(*plain, *asked) if answer != (200, "")] == []
        await asyncio.gather(*under_way)
