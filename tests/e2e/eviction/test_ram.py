"""A real neuron without GPUs and a real cortex: models on the CPU are loaded into RAM and evicted for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config, until
from tests.ports import free_port

__all__ = ["mark"]


def in_ram(model_id: str, **fields: Any) -> dict[str, Any]:
    profile = {"id": model_id, "harness": "sim", "devices": 0, "min_residency_secs": 0, **fields}
    return {**profile, "args": [*fields.get("args", ()), "--ttft-ms", "0", "--load-secs", "0.1"]}


async def test_models_are_evicted_for_ram(mark: str, tmp_path: Path) -> None:
    """Cold loads through requests, with the figures in /fleet and `explain`; a model for a GPU has no host; a model
    without `vram_mb` is placed by what it used."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    text = config.read_text()
    start = text.index("[simulate]")
    end = text.find("\n[", start)
    rest = text[end:] if end > 0 else ""
    config.write_text(f"{text[:start]}[simulate]\nram_mb = 64000\ncores = 16\n{rest}")
    models = [
        in_ram("org/a", vram_mb=40_000),
        in_ram("org/b", vram_mb=40_000),
        in_ram("org/unsized", args=["--vram-mb", "15000"]),
        {"id": "org/gpu", "harness": "sim", "vram_mb": 1000},
    ]
    async with (
        aiohttp.ClientSession() as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], models) as cortex,
    ):

        async def ask(model_id: str) -> tuple[int, Any]:
            body = {"prompt": "x", "max_tokens": 1, "model": model_id}
            async with http.post(f"{cortex.url}/v1/completions", json=body) as response:
                return response.status, await response.json()

        async def got(path: str) -> Any:
            async with http.get(f"{cortex.url}{path}") as response:
                return await response.json()

        async def explained() -> Any:
            """Once cortex has read the figures after the last load."""
            found = await got("/fleet/explain?model=org/b")
            return found if found["nodes"][0]["free_ram_mb"] == 64_000 - 4_096 - 40_000 - 15_000 else None

        for model_id in ("org/a", "org/b", "org/unsized", "org/a", "org/unsized"):
            status, answer = await ask(model_id)
            assert status == 200, answer
        explanation = await until(explained)
        assert (await neuron.model("org/b"))["status"] == "unloaded"
        assert (await neuron.model("org/a"))["ram_booked_mb"] == 40_000
        (node,) = (await got("/fleet"))["nodes"]
        assert (node["devices"], node["host"]["ram_total_mb"], node["host"]["cores"]) == ([], 64_000, 16)
        assert explanation["decision"]["evict"] == ["org/a"]
        assert "RAM has" in explanation["decision"]["devices_because"]
        status, answer = await ask("org/gpu")
        assert (status, answer["error"]["code"]) == (404, "no_feasible_neuron")
        assert "needs a GPU, has none: only models with devices = 0 run here" in answer["error"]["message"]
        assert (await ask("org/unsized"))[0] == 200
