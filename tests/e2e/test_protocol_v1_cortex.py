"""A cortex that speaks only protocol v1 and ours before the same neuron, which has its default configuration."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.cortex.cortex_process import CortexProcess, cortex_process, neuron_at
from tests.e2e.test_neuron_restart import MODEL, ask
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config, until
from tests.neuron.v1_cortex import v1_cortex
from tests.ports import free_port

__all__ = ["mark"]

OTHER = "org/other"
NO_WAITING = {"min_residency_secs": 0, "patience_secs": 0.3, "pause_secs": 0.1}


def model(model_id: str, *arguments: str) -> dict[str, Any]:
    return {"id": model_id, "harness": "sim", "vram_mb": 20_000, "args": list(arguments)}


async def fleet(session: aiohttp.ClientSession, cortex: CortexProcess) -> dict[str, Any]:
    async with session.get(f"{cortex.url}/fleet") as response:
        found: dict[str, Any] = await response.json()
    return found


async def test_our_cortex_uses_engines_without_keys(mark: str, tmp_path: Path) -> None:
    """It sends no key to an engine that a protocol v1 cortex loaded, also after a restart of neuron, nor to one that it
    loads there itself; both cortexes serve both models by turns on one card."""
    port = free_port()
    lines = (f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'on_stop = "leave_engines"')
    config = toml_config(tmp_path, *lines)
    config.write_text(config.read_text().replace('"--load-secs", "0.2"', '"--load-secs", "0.2", "--vram-mb", "20000"'))
    async with (
        aiohttp.ClientSession() as session,
        neuron_process(config) as first,
        v1_cortex(first) as other,
        cortex_process(tmp_path, [neuron_at(port)], [model(MODEL), model(OTHER)], placement=NO_WAITING) as cortex,
    ):
        await other.forward(MODEL)
        assert await ask(session, cortex.url, stream=True) is None
        assert "key" not in json.dumps(await fleet(session, cortex))
        await first.stop()
        async with neuron_process(config) as second:
            await second.until_status(MODEL, "loaded")
            await until(lambda: ask_ok(session, cortex))
            for wanted in (OTHER, MODEL):
                async with session.post(
                    f"{cortex.url}/v1/completions", json={"model": wanted, "prompt": "x", "max_tokens": 3}
                ) as response:
                    assert response.status == 200, await response.text()
                assert "chat.completion" in await other.forward(OTHER if wanted == MODEL else MODEL)
            config.write_text(config.read_text().replace("leave_engines", "stop_engines"))
            for each in (MODEL, OTHER):
                await second.unload(each)


async def ask_ok(session: aiohttp.ClientSession, cortex: CortexProcess) -> bool:
    return await ask(session, cortex.url, stream=False) is None


async def test_an_engine_dies_under_both(mark: str, tmp_path: Path) -> None:
    """Our cortex loaded the model with a key. The other one gets an engine without one, and when that dies both are
    served by its successor."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}")
    async with (
        aiohttp.ClientSession() as session,
        neuron_process(config) as neuron,
        v1_cortex(neuron) as other,
        cortex_process(tmp_path, [neuron_at(port)], [model(MODEL)]) as cortex,
    ):
        assert await ask(session, cortex.url, stream=False) is None
        assert (await neuron.endpoint(MODEL)).body["api_key"]
        await other.forward(MODEL)
        assert (await neuron.endpoint(MODEL)).body["api_key"] is None
        assert await ask(session, cortex.url, stream=False) is None
        psutil.Process((await neuron.model(MODEL))["pid"]).kill()
        await neuron.until_status(MODEL, "recovering")
        results = await asyncio.gather(
            ask(session, cortex.url, stream=True),
            other.forward(MODEL, to=(await other.endpoint(MODEL)).body["url"]),
        )
        assert results[0] is None
