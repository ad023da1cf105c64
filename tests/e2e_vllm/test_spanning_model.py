"""A model of the catalogue that spans two neurons, with the real vLLM, one core each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex, start_cortex
from tests.e2e.groups.conftest import Host
from tests.e2e_vllm.conftest import RealVllm
from tests.e2e_vllm.test_group import on_core
from tests.neuron.neurons import marked_engines, marked_processes, neuron_here, until

__all__ = ["start_cortex"]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "org/wide"


async def chat(cortex: RunningCortex) -> tuple[int, Any]:
    """The status, and the tokens of the answer or the error."""
    async with cortex.chat(MODEL, max_tokens=8) as answer:
        body = await answer.json()
        return answer.status, body["usage"]["completion_tokens"] if answer.status == 200 else body


async def test_a_spanning_model_survives_a_restart_of_a_neuron(
    start_cortex: StartCortex, mark: str, real_vllm: RealVllm, tmp_path: Path
) -> None:
    """A chat loads it over both neurons, tensor parallel. The neuron of the part without a server restarts: the engine
    comes back whole with the next chat. An unload leaves no process."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores: ranks that share one wait for each other in spin locks")
    model = {
        "id": MODEL,
        "source": str(real_vllm.tiny),
        "parallel": {"tensor": 2},
        "span_nodes": True,
        "vram_mb": 4000,
        "args": ["--max-model-len", "512"],
    }
    first, second = (on_core(core, tmp_path, real_vllm, devices=1) for core in cores)
    async with neuron_here(first) as a:
        async with neuron_here(second) as b:
            cortex = await start_cortex([Host("a", a), Host("b", b)], [model], poll={"timeout_secs": 5})
            assert await chat(cortex) == (200, 8)
            assert [(await neuron.model(MODEL))["status"] for neuron in (a, b)] == ["loaded", "loaded"]
            port = int(b.base.rpartition(":")[2])
        await until(lambda: not marked_engines(mark))
        async with neuron_here(second, port=port) as b:
            await cortex.until(lambda: len(cortex.parts.fleet.snapshot().healthy) == 2)
            assert await chat(cortex) == (200, 8)
            assert (await b.model(MODEL))["group"]["rank"] == 1
            async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": MODEL}) as answer:
                assert answer.status == 200, await answer.text()
            assert not marked_processes(mark)
