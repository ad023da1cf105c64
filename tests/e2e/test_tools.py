"""Tools from the catalogue to the engine: `tools = true` becomes flags, and a refusal of tools gets a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.ports import free_port

__all__ = ["mark"]

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
BODY = {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER]}
MODELS = [
    {"id": "Qwen/Qwen3-8B", "harness": "sim", "vram_mb": 4000, "tools": True},
    {"id": "org/bare", "harness": "sim", "vram_mb": 4000, "args": ["--no-enable-auto-tool-choice"]},
]


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_of_the_catalogue(mark: str, tmp_path: Path, stream: bool) -> None:
    """Tools are refused as the catalogue says, also where the answer's head was sent during the load (the stream)."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    async with (
        aiohttp.ClientSession() as http,
        neuron_process(config) as neuron,
        cortex_process(tmp_path, [neuron_at(port)], MODELS, waiting={"first_comment_secs": 0.1}) as cortex,
    ):

        async def ask(model: str) -> tuple[int, Any]:
            body = {**BODY, "model": model, "stream": stream}
            async with http.post(f"{cortex.url}/v1/chat/completions", json=body) as response:
                return response.status, await response.text()

        status, called = await ask("Qwen/Qwen3-8B")
        assert status == 200
        assert '"tool_calls"' in called
        command = psutil.Process((await neuron.model("Qwen/Qwen3-8B"))["pid"]).cmdline()
        assert command[command.index("--tool-call-parser") + 1] == "hermes"
        assert command[command.index("--reasoning-parser") + 1] == "qwen3"
        for _ in range(2):
            status, refused = await ask("org/bare")
            assert "--enable-auto-tool-choice and --tool-call-parser to be set" in refused
        lines = [line for line in cortex.log().splitlines() if "tools = true" in line]
        assert len(lines) == 1, "the hint comes once"
        assert "org/bare on n refused a request with tools" in lines[0]
