"""`max_model_len`: a number, or the longest context that fits on the card by the estimate."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuron.estimate.estimator import AvailableMemory, longest_context
from neuron.estimate.locate import model_at
from neuron.estimate.options import EngineOptions
from neuron.estimate.weights import ModelFiles
from neuron.harness.vllm.estimate.estimator import VllmEstimator
from shared.protocol import Device
from tests.neuron.estimate.published import LLAMA_8B
from tests.neuron.estimate.safetensors import llama_tensors, write_model
from tests.neuron.neurons import Neuron, config_of, neuron_here

MODEL = "org/model"
CARD = (Device(index=0, name="RTX 5090", vram_total_mb=32_607),)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint of the size of Llama 3.1 8B, in sparse files. Its 131,072 tokens do not fit on one 32 GiB card."""
    return write_model(tmp_path / "roots" / "llama", LLAMA_8B.config, llama_tensors(LLAMA_8B.config))


def files_of(directory: Path) -> ModelFiles:
    return model_at(str(directory), {}, revision=None, download_dir=None)


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")


def fitting(directory: Path, limit_mb: int, options: EngineOptions | None = None, tensor: int = 1) -> int | None:
    options = replace(options or EngineOptions(), tensor_parallel=tensor)
    return longest_context(
        VllmEstimator(), files_of(directory), options, AvailableMemory(CARD * tensor, tensor, limit_mb)
    )


@pytest.mark.parametrize("limit_mb", [20_000, 24_000, 30_000])
def test_it_is_the_longest_that_leaves_a_margin(llama: Path, limit_mb: int) -> None:
    length = fitting(llama, limit_mb)
    assert length
    model, estimator = files_of(llama), VllmEstimator()
    needed = [
        estimator.estimate(model, EngineOptions(max_model_len=tokens), CARD).per_device_mb(1)
        for tokens in (length, length + 256)
    ]
    assert needed[0] <= limit_mb * 0.95 < needed[1]


def test_more_memory_is_more_context(llama: Path) -> None:
    """Until the model's own context fits; nothing is said where none does, or where an item is unknown."""
    lengths = [fitting(llama, limit_mb) or 0 for limit_mb in range(17_000, 36_000, 1000)]
    assert lengths == sorted(lengths)
    assert fitting(llama, 60_000) == 0
    assert fitting(llama, 30_000, tensor=2) == 0
    assert fitting(llama, 15_000) is None
    assert fitting(llama, 24_000, EngineOptions(not_counted=("--enable-lora",))) is None
    assert fitting(llama, 24_000, EngineOptions(kv_cache_bytes=1 << 30)) is None


async def served(neuron: Neuron, source: Path | None = None, *args: str, **fields: Any) -> tuple[int, list[str]]:
    """The context that the engine says it serves, and its own arguments for it."""
    answer = await neuron.load(MODEL, *args, source=str(source or MODEL), **fields)
    assert answer.status == 200, answer.body
    view = await neuron.model(MODEL)
    argv = arguments_of(view["pid"])
    return view["max_model_len"], [argv[at + 1] for at, word in enumerate(argv) if word == "--max-model-len"]


async def test_a_number_is_what_the_engine_serves(neuron: Neuron) -> None:
    """The same number again is the same engine; another one is a conflict."""
    assert await served(neuron, max_model_len=5000) == (5000, ["5000"])
    assert (await neuron.load(MODEL, max_model_len=5000)).status == 200
    other = await neuron.load(MODEL, max_model_len=6000)
    assert (other.status, other.error["code"]) == (409, "already_loaded")
    assert "max_model_len is 5000, asked for 6000" in other.error["message"]


async def test_auto_is_fitted_to_the_card(neuron: Neuron, llama: Path) -> None:
    """On a 32 GiB card with the engine's default share, and less in less memory. What cannot be estimated is left to
    the engine. The same command again is the same engine."""
    length, given = await served(neuron, llama, max_model_len="auto")
    assert given == [str(length)] == [str(await asyncio.to_thread(fitting, llama, int(32_607 * 0.92)))]
    assert (await neuron.load(MODEL, source=str(llama), max_model_len="auto")).status == 200
    await neuron.unload(MODEL)
    shorter, _ = await served(neuron, llama, max_model_len="auto", vram_mb=20_000)
    assert shorter == await asyncio.to_thread(fitting, llama, 20_000)
    await neuron.unload(MODEL)
    assert (await served(neuron, max_model_len="auto"))[1] == ["auto"]


async def test_it_is_the_models_own_where_that_fits(neuron: Neuron, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (llama / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}), encoding="utf-8")
    assert (await served(neuron, llama, max_model_len="auto"))[1] == []


@pytest.mark.parametrize("value", [0, -1, 1.5, "32k", True, [1]])
async def test_other_values_are_refused(neuron: Neuron, value: object) -> None:
    answer = await neuron.load(MODEL, max_model_len=value)
    assert (answer.status, answer.error["param"]) == (400, "max_model_len")
    assert 'at least 1, or "auto"' in answer.error["message"]


async def test_two_lengths_are_refused(neuron: Neuron) -> None:
    """However the argument is abbreviated."""
    for flag in (("--max-model-len", "9"), ("--max_model_len=9",), ("--max-mo=9",)):
        answer = await neuron.load(MODEL, *flag, max_model_len=5000)
        assert (answer.status, answer.error["param"]) == (400, "max_model_len")
        assert "--max-model-len is in its args too" in answer.error["message"]


async def test_auto_is_fitted_to_the_ram_of_a_host_without_gpus(llama: Path, tmp_path: Path) -> None:
    """Without what neuron keeps free and what the engine's processes take."""
    simulate = {"devices": [], "ram_mb": 32_000}
    config = config_of(tmp_path / "state", simulate=simulate, sleep={"ram_reserve_mb": 2000})
    async with neuron_here(config) as neuron:
        length, given = await served(neuron, llama, max_model_len="auto")
        assert given == [str(length)]
        limit = 30_000 - VllmEstimator.in_ram_mb
        assert length == await asyncio.to_thread(fitting, llama, limit)
