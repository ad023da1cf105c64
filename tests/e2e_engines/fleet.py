"""The fleet of these tests: a cortex and a neuron with vLLM, llama.cpp, infinity and the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.environment.infinity import InfinityEnvironment
from tests.environment.llama_cpp import LlamaCppEnvironment
from tests.services import Fleet, running_fleet

VLLM, GGUF, EMBEDDER, RERANKER, SIMULATED = "test/qwen3", "test/gguf", "test/minilm", "test/reranker", "test/simulated"
BROKEN_GGUF = "test/broken-gguf"


@dataclass(frozen=True)
class Engines:
    """The real engines and their models."""

    vllm: list[str]
    qwen3: Path
    minilm: Path
    llama_cpp: LlamaCppEnvironment
    infinity: InfinityEnvironment


@contextmanager
def running_mixed_fleet(directory: Path, engines: Engines) -> Iterator[Fleet]:
    offline = {"HF_HUB_OFFLINE": "1"}
    harness: dict[str, Any] = {
        "vllm": {
            "command": engines.vllm,
            "startup_timeout_secs": 240,
            "extra_args": ["--dtype", "bfloat16", "--enforce-eager", "--kv-cache-memory-bytes", "64M"],
            "env": {**offline, "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        },
        "llama": {"preset": "llama.cpp", "command": [str(engines.llama_cpp.server)]},
        "infinity": {
            "preset": "infinity",
            "command": [*engines.infinity.command, "v2"],
            "startup_timeout_secs": 240,
            # Warming up measures the speed for half a minute.
            "extra_args": ["--device", "cpu", "--no-model-warmup", "--no-bettertransformer"],
            "env": offline,
        },
        "sim": {},
    }
    neuron: dict[str, Any] = {
        "harnesses": [{"name": name} for name in harness],
        "harness": harness,
        "simulate": {"devices": ["RTX 5090", "RTX 5090"], "ram_mb": 16000},
    }
    broken = directory / "broken.gguf"
    broken.write_bytes(engines.llama_cpp.tiny.read_bytes()[:300])
    models: list[dict[str, Any]] = [
        {
            "id": VLLM,
            "harness": "vllm",
            "source": str(engines.qwen3),
            "vram_mb": 2000,
            "args": ["--max-model-len", "512"],
        },
        {"id": GGUF, "harness": "llama", "source": str(engines.llama_cpp.tiny), "vram_mb": 500, "devices": 0},
        {"id": BROKEN_GGUF, "harness": "llama", "source": str(broken), "vram_mb": 500},
        {"id": EMBEDDER, "harness": "infinity", "source": str(engines.minilm), "vram_mb": 1000, "devices": 0},
        {"id": RERANKER, "harness": "infinity", "source": str(engines.infinity.reranker), "vram_mb": 1000},
        {"id": SIMULATED, "harness": "sim", "vram_mb": 2000},
    ]
    catalogue = {"models": models, "aliases": {"gguf": GGUF}}
    with running_fleet(directory, neuron, {"poll": {"interval_secs": 0.5}}, catalogue) as fleet:
        yield fleet
