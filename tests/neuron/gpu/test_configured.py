"""Accelerators that neuron.toml lists: booked as written, never measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuron.config import NeuronConfig
from tests.neuron.neurons import REPOSITORY, neuron_process
from tests.neuron.recording_vllm import calls, vllm_config

GAUDI = {"name": "Gaudi 3", "memory_mb": 100_000, "count": 2, "variable": "HABANA_VISIBLE_MODULES"}


async def test_what_is_written_is_booked(tmp_path: Path) -> None:
    """The whole memory can be booked, and a load that does not fit is refused; an engine learns its devices by the
    variable."""
    entry = "\n".join(f"{key} = {json.dumps(value)}" for key, value in GAUDI.items())
    config = vllm_config(tmp_path, (29450, 29499), f"[[accelerators]]\n{entry}")
    async with neuron_process(config, env={"PYTHONPATH": str(REPOSITORY)}) as neuron:
        devices = (await neuron.call("GET", "/discovery")).body["devices"]
        assert [(each["index"], each["vendor"], each["vram_total_mb"]) for each in devices] == [
            (0, "unknown", 100_000),
            (1, "unknown", 100_000),
        ]

        async def load(model: str, **more: object) -> int:
            command = {"model_id": model, "harness": "vllm", **more}
            return (await neuron.call("POST", "/models/load", json=command)).status

        assert await load("one", vram_mb=60_000, devices=[1]) == 200
        given = calls(tmp_path)[-1].variables
        assert given["HABANA_VISIBLE_MODULES"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in given
        assert await load("two", vram_mb=60_000, devices=[1]) == 409
        assert await load("two", vram_mb=100_000) == 200
        assert await load("three", vram_mb=40_000) == 200
        live = (await neuron.call("GET", "/health")).body["devices"]
        figures = [(each["vram_used_mb"], each["vram_free_mb"], each["vram_bookable_mb"]) for each in live]
        assert figures == [(100_000, 0, 0), (100_000, 0, 0)]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"accelerators": [GAUDI, {**GAUDI, "variable": "OTHER"}]}, "the same variable"),
        ({"accelerators": [{"name": "x", "memory_mb": 0}]}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(extra: dict[str, object], reason: str) -> None:
    """With the key and the reason."""
    with pytest.raises(ValueError, match=reason):
        NeuronConfig.model_validate({"accelerators": [GAUDI], **extra})
