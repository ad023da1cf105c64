"""A real vLLM from a spare process: the same answers, sleep, adoption and recovery as after a plain start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from neuron.engine.session import Leader, live_members
from shared.system.process_stat import stat_of
from tests.e2e_vllm.conftest import RealVllm
from tests.neuron.neurons import NeuronProcess, marked_processes, neuron_process, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "tiny"
SECS = 240.0
ARGS = ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]


def config_file(directory: Path, vllm: RealVllm) -> Path:
    path = directory / "neuron.toml"
    path.write_text(
        f'port = 0\nstate_dir = "{directory}/state"\n[harness.vllm]\ncommand = {json.dumps(vllm.command)}\n'
        f'extra_args = {json.dumps(ARGS)}\nsleep_mode = "dev"\nspare = true\nport_range = [28000, 28099]\n'
        '[harness.vllm.env]\nHF_HUB_OFFLINE = "1"\n',
        encoding="utf-8",
    )
    return path


async def load(neuron: NeuronProcess, vllm: RealVllm) -> dict[str, Any]:
    """Loads the model; its entry of `/models`."""
    body = {"model_id": MODEL, "harness": "vllm", "source": str(vllm.tiny)}
    answer = await neuron.call("POST", "/models/load", json=body)
    assert answer.status == 200, answer.body
    return await neuron.model(MODEL)


async def text_of(neuron: NeuronProcess) -> str:
    """Its answer to a question, at temperature 0, as JSON."""
    engine = (await neuron.endpoint(MODEL)).body
    body = {
        "model": MODEL,
        "prompt": "The cat sees",
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 1,
        "min_tokens": 24,
    }
    headers = {"Authorization": f"Bearer {engine['api_key']}"} if engine.get("api_key") else {}
    async with neuron.session.post(f"{engine['url']}/v1/completions", json=body, headers=headers) as answer:
        assert answer.status == 200
        return json.dumps((await answer.json())["choices"])


async def ready_spare(neuron: NeuronProcess) -> int:
    """The pid of the spare process once it is ready."""

    async def ready() -> int | None:
        found = (await neuron.call("GET", "/health")).body["spares"]
        return next((spare["pid"] for spare in found if spare["state"] == "ready"), None)

    pid: int = await until(ready, SECS)
    return pid


def members(pid: int) -> set[int]:
    found = stat_of(pid)
    assert found is not None
    return live_members(Leader(pid, found.start_ticks, "none"))


async def test_engine_from_a_spare(real_vllm: RealVllm, mark: str, tmp_path: Path) -> None:
    """It answers as after a plain start, with its core forked and titled; sleeps behind the guard; is adopted after a
    kill -9 of neuron, whose spare ends by itself; killed itself, it leaves nothing and is restarted."""
    config = config_file(tmp_path, real_vllm)
    async with neuron_process(config) as first:
        plain = await load(first, real_vllm)
        before = await text_of(first)
        kinds = sorted(psutil.Process(pid).name() for pid in members(plain["pid"]))
        await first.call("POST", "/models/unload", json={"model_id": MODEL})
        spare = await ready_spare(first)
        entry = await load(first, real_vllm)
        assert entry["pid"] == spare != plain["pid"]
        assert await text_of(first) == before
        names = sorted(psutil.Process(pid).name() for pid in members(spare))
        assert [name for name in names if name.startswith("VLLM")] == [
            name for name in kinds if name.startswith("VLLM")
        ]
        core = next(pid for pid in members(spare) if psutil.Process(pid).name().startswith("VLLM::EngineCor"))
        assert psutil.Process(psutil.Process(core).ppid()).ppid() == spare  # forked, not spawned
        for step in ("sleep", "wake"):
            assert (await first.call("POST", f"/models/{step}", json={"model_id": MODEL})).status == 200
        assert await text_of(first) == before
        waiting = await ready_spare(first)
        await first.stop(signal.SIGKILL)
        await until(lambda: waiting not in marked_processes(mark))
        async with neuron_process(config) as second:
            assert (await second.until_status(MODEL, "loaded"))["pid"] == spare
            assert await text_of(second) == before
            old = members(spare)
            os.kill(spare, signal.SIGKILL)

            async def restarted() -> bool:
                found = await second.model(MODEL)
                return bool(found["status"] == "loaded" and found["pid"] != spare)

            await until(restarted, SECS)
            assert not old & set(marked_processes(mark))
            assert await text_of(second) == before
    await until(lambda: not marked_processes(mark))
