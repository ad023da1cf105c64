"""A load that retrying cannot heal reaches the client at once, with the client packages' own retries on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import neuron_process, toml_config
from tests.ports import free_port

__all__ = ["mark"]

HELLO: Any = [{"role": "user", "content": "Hello"}]


def failing(fault: str) -> dict[str, Any]:
    return {"id": fault, "harness": "sim", "vram_mb": 4000, "args": ["--load-secs", "0.2", "--fault", fault]}


MODELS = [failing("unsupported-model"), failing("oom-at-load"), {**failing("hang"), "args": ["--nonsense"]}]


@pytest.mark.parametrize("model", [entry["id"] for entry in MODELS])
async def test_clients_report_it_at_once(mark: str, tmp_path: Path, model: str) -> None:
    """An unsupported model, memory that is too small for it, and an unknown flag: one load, no retry."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    async with neuron_process(config) as neuron, cortex_process(tmp_path, [neuron_at(port)], MODELS) as cortex:
        began = time.monotonic()
        async with openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="none", max_retries=5) as client:
            with pytest.raises(openai.InternalServerError) as failed:
                await client.chat.completions.create(model=model, messages=HELLO)
        async with anthropic.AsyncAnthropic(base_url=cortex.url, api_key="none", max_retries=5) as claude:
            with pytest.raises(anthropic.InternalServerError):
                await claude.messages.create(model=model, messages=HELLO, max_tokens=10)
        took = time.monotonic() - began
        assert failed.value.status_code == 503
        assert failed.value.response.headers["x-should-retry"] == "false"
        assert took < 8, "five retries take longer"
        assert (await neuron.model(model))["permanent"] is True


async def test_codex_and_the_packages_see_the_reason_in_a_stream(mark: str, tmp_path: Path) -> None:
    """The head was sent early; the last event has the shape that raises in each package."""
    port = free_port()
    config = toml_config(tmp_path, f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"')
    waiting = {"first_comment_secs": 0.05, "comment_interval_secs": 0.05}
    slow = [{**MODELS[0], "args": ["--load-secs", "1", "--fault", "oom-at-load"], "id": f"m{n}"} for n in range(3)]
    async with (
        neuron_process(config),
        cortex_process(tmp_path, [neuron_at(port)], slow, waiting=waiting) as cortex,
        openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="none") as client,
        anthropic.AsyncAnthropic(base_url=cortex.url, api_key="none") as claude,
    ):
        with pytest.raises(openai.APIError, match="CUDA out of memory"):
            async for _ in await client.chat.completions.create(model="m0", messages=HELLO, stream=True):
                pass
        with pytest.raises(openai.APIError, match="CUDA out of memory"):
            async with client.responses.stream(model="m1", input="Hello") as stream:
                await stream.get_final_response()
        with pytest.raises(anthropic.APIError, match="CUDA out of memory"):
            async with claude.messages.stream(model="m2", messages=HELLO, max_tokens=10) as events:
                await events.get_final_message()
