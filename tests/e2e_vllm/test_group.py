"""A real vLLM that spans two neurons on this machine, one core each."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import aiohttp
import pytest

from neuron.config import NeuronConfig
from tests.e2e_vllm.conftest import RealVllm
from tests.neuron.groups.groups import MODEL, load_parts
from tests.neuron.neurons import config_of, marked_processes, neuron_here

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def on_core(core: int, directory: Path, vllm: RealVllm, *, devices: int = 2) -> NeuronConfig:
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    harness = {
        "command": vllm.command,
        "startup_timeout_secs": 240,
        "port_range": [28100 + 400 * core, 28499 + 400 * core],
        "extra_args": ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M"],
        "env": env,
        "spare": False,
    }
    simulate = {"devices": ["RTX 5090"] * devices}
    return config_of(directory / str(core), harnesses=[{"name": "vllm"}], harness={"vllm": harness}, simulate=simulate)


async def test_two_neurons_run_one_vllm(mark: str, real_vllm: RealVllm, tmp_path: Path) -> None:
    """It answers; when the part without a server is killed, its neuron says so; the unload ends rank 0's processes."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores: ranks that share one wait for each other in spin locks")
    async with (
        neuron_here(on_core(cores[0], tmp_path, real_vllm)) as first,
        neuron_here(on_core(cores[1], tmp_path, real_vllm)) as second,
    ):
        spec = {"harness": "vllm", "source": str(real_vllm.tiny), "args": ["--max-model-len", "512"]}
        answers = await load_parts("g1", [first, second], **spec)
        assert [answer.status for answer in answers] == [200, 200], [answer.body for answer in answers]
        headers = {"Authorization": f"Bearer {answers[0].body['api_key']}"}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{answers[0].body['url']}/v1/chat/completions", json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["usage"]["completion_tokens"] == 8
        os.killpg((await second.model(MODEL))["pid"], signal.SIGKILL)
        entry = await second.until_status(MODEL, "failed")
        assert entry["reason"] == "part 1 of 2 of group g1 ended"
        for neuron in (first, second):
            assert (await neuron.unload(MODEL)).status == 200
        assert not marked_processes(mark)
