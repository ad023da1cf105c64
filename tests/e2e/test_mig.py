"""cortex and a neuron on a GPU that is split into MIG instances: real processes, and a real library as NVML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cortex.cortex_process import cortex_process, neuron_at
from tests.neuron.neurons import REPOSITORY, neuron_process, until
from tests.neuron.recording_vllm import calls, vllm_config
from tests.nvml.library import A100_SLICED, build_library, mig_uuid_of, write_scenario
from tests.ports import free_port

SMALL = {"harness": "vllm", "vram_mb": 8000}
MODELS: list[dict[str, Any]] = [
    {"id": "first", **SMALL},
    {"id": "second", **SMALL},
    {"id": "wide", "harness": "vllm", "vram_mb": 8000, "min_devices": 2},
]


async def test_models_on_instances_that_come_while_it_runs(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A model gets an instance by its UUID. The next one gets an instance created meanwhile: no model is evicted and
    nothing is restarted. One that needs two devices is refused with the reason."""
    library = build_library(tmp_path_factory.getbasetemp() / "nvml")
    one = (replace(A100_SLICED, slices=A100_SLICED.slices[:1]),)
    environment = {**library, **write_scenario(tmp_path / "gpus", one), "PYTHONPATH": str(REPOSITORY)}
    port = free_port()
    async with (
        neuron_process(vllm_config(tmp_path, (29500, 29549), port=port, name="sliced"), env=environment),
        cortex_process(tmp_path, [neuron_at(port, "sliced")], MODELS) as cortex,
        aiohttp.ClientSession(cortex.url) as session,
    ):

        async def ask(model: str) -> tuple[int, Mapping[str, Any]]:
            body = {"model": model, "prompt": "x", "max_tokens": 2}
            async with session.post("/v1/completions", json=body) as response:
                return response.status, await response.json()

        assert (await ask("first"))[0] == 200
        status, refusal = await ask("wide")
        assert status >= 400
        assert "needs 2 devices, has 1" in json.dumps(refusal)
        write_scenario(tmp_path / "gpus", (A100_SLICED,))

        async def noticed() -> bool:
            async with session.get("/fleet") as response:
                (node,) = (await response.json())["nodes"]
            return [device["index"] for device in node["devices"]] == [0, 102, 109, 110]

        await until(noticed)
        assert (await ask("second"))[0] == 200
        _, refusal = await ask("wide")
        assert "2 devices that can work with others, has 0: 3 of 3 are MIG instances" in json.dumps(refusal)
        async with session.get("/v1/models") as response:
            listed = {each["id"]: each for each in (await response.json())["data"]}
        assert {model for model, each in listed.items() if each["locations"]} >= {"first", "second"}
    given = [each.variables["CUDA_VISIBLE_DEVICES"] for each in calls(tmp_path)]
    assert given == [mig_uuid_of(0, 9), mig_uuid_of(0, 10)]
