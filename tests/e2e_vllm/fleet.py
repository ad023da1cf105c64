"""The fleet of these tests: a cortex and a neuron with a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services import Fleet, running_fleet

TINY, PAIR, BROKEN, MINILM = "test/tiny", "test/tiny-on-two", "test/broken", "test/minilm"
ROOMY = "test/tiny-for-agents"


@contextmanager
def running_vllm_fleet(directory: Path, command: list[str], tiny: Path, minilm: Path) -> Iterator[Fleet]:
    """`command` starts vLLM; `tiny` and `minilm` are the directories of the models."""
    harness = {
        "command": command,
        "startup_timeout_secs": 240,
        # Two cores: no compilation, and a key-value cache of a fixed size instead of most of the memory.
        "extra_args": ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M"],
        "env": {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    }
    neuron: dict[str, Any] = {
        "harnesses": [{"name": "vllm"}],
        "harness": {"vllm": harness},
        "simulate": {"devices": ["RTX 5090", "RTX 5090"]},
    }
    short = ["--max-model-len", "512"]
    # Beyond the positions of the model's files: its answers are random anyway.
    roomy = ["--max-model-len", "65536", "--hf-overrides", '{"max_position_embeddings": 65536}']
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    models: list[dict[str, Any]] = [
        {
            "id": TINY,
            "source": str(tiny),
            "vram_mb": 2000,
            "tools": True,
            "max_model_len": 512,
            "args": ["--tool-call-parser", "hermes"],
        },
        {"id": PAIR, "source": str(tiny), "min_devices": 2, "vram_mb": 4000, "args": short},
        {"id": ROOMY, "source": str(tiny), "vram_mb": 2000, "args": [*roomy, *tools]},
        {"id": BROKEN, "source": str(directory / "nothing-here"), "vram_mb": 2000},
        {
            "id": MINILM,
            "source": str(minilm),
            "vram_mb": 2000,
            "args": ["--runner", "pooling", "--convert", "embed"],
        },
    ]
    catalogue = {"models": models, "aliases": {"tiny": TINY}}
    with running_fleet(directory, neuron, {"poll": {"interval_secs": 0.5}}, catalogue) as fleet:
        yield fleet
