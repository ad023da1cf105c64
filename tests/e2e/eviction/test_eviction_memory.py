"""A real neuron and a real cortex: one model is evicted for another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config, until
from tests.ports import free_port

__all__ = ["mark"]

STAYS_SECS = 1.5
"""How long the evicted engine ignores SIGTERM."""


def model(model_id: str, vram_mb: int, *args: str) -> dict[str, Any]:
    profile = {"id": model_id, "harness": "sim", "vram_mb": vram_mb, "min_residency_secs": 0}
    return {**profile, "args": [*args, "--ttft-ms", "0"]}


async def test_memory_is_reserved_before_it_is_free(mark: str, tmp_path: Path) -> None:
    """While the old model stops, its memory is already reserved for the new one: a third load is refused."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    config.write_text(config.read_text().replace("port_range", f"stop_timeout_secs = {STAYS_SECS}\nport_range"))
    models = [model("old", 20_000, "--fault", "ignore-sigterm"), model("new", 16_000)]
    body = {"prompt": "x", "max_tokens": 1}
    async with (
        aiohttp.ClientSession() as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], models) as cortex,
    ):

        async def ask(model_id: str) -> int:
            async with http.post(f"{cortex.url}/v1/completions", json={**body, "model": model_id}) as response:
                return response.status

        async def old_is_stopping() -> bool:
            return bool((await neuron.model("old"))["state"] == "stopping")

        async def new_is_known() -> bool:
            return bool(await neuron.model("new"))

        assert await ask("old") == 200
        asking = asyncio.create_task(ask("new"))
        await until(old_is_stopping)
        await until(new_is_known)
        assert (await neuron.model("old"))["state"] == "stopping"
        assert (await neuron.load("third", vram_mb=16_000)).error["code"] == "insufficient_vram"
        assert await asking == 200
