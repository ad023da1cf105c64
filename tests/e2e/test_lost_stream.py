"""An engine dies in the middle of a stream: the client and the operator are told which one, and why."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/model"


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_last_event_says_which_engine_died_and_why(mark: str, tmp_path: Path, workers: int) -> None:
    """It names the model, the node and the reason that the neuron found, and belongs to the response that began. The
    log has one warning with the same words."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    models = [{"id": MODEL, "harness": "sim", "vram_mb": 4000}]
    async with (
        aiohttp.ClientSession() as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], models, workers=workers) as cortex,
    ):
        body = {"model": MODEL, "input": "x", "max_output_tokens": 4000, "ignore_eos": True, "stream": True}
        async with http.post(f"{cortex.url}/v1/responses", json=body) as response:
            events = _events(response)
            created = await anext(events)
            while created["type"] != "response.created":
                created = await anext(events)
            await anext(events)
            os.kill((await neuron.model(MODEL))["pid"], signal.SIGKILL)
            last = [event async for event in events][-1]
    assert last["type"] == "response.failed"
    for name in ("id", "created_at", "model"):
        assert last["response"][name] == created["response"][name]
    message = last["error"]["message"]
    for part in (MODEL, " on n ", "killed by signal 9"):
        assert part in message
    assert last["error"]["code"] == "upstream_lost"
    warnings = [line for line in cortex.log().splitlines() if " WARNING " in line and "was lost" in line]
    assert len(warnings) == 1
    assert message in warnings[0]


async def _events(response: aiohttp.ClientResponse) -> Any:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
