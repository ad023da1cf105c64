"""LoRA adapters of the real vLLM on the CPU, loaded for cortex by a neuron, through its guard."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.cortex.cortex_process import ListedNeuron, cortex_process
from tests.e2e_vllm.conftest import RealVllm
from tests.neuron.lifecycle.test_adapters import BASE, ask, attach, detach
from tests.neuron.neurons import config_of, neuron_here

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

RANK = 12
"""Not one of those that vLLM accepts as its limit: neuron rounds it up."""


def tiny_adapter(directory: Path, model: Path) -> str:
    """An adapter of the model's query projections, in PEFT's format, with weights that are all equal."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rows, columns = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    tensors: dict[str, Any] = {}
    end = 0
    for layer in range(config["num_hidden_layers"]):
        for part, shape in (("A", [RANK, columns]), ("B", [rows, RANK])):
            begin, end = end, end + 4 * shape[0] * shape[1]
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
            tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(tensors).encode()
    data = struct.pack("<f", 0.01) * (end // 4)
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return str(directory)


async def test_adapters_of_a_real_vllm(real_vllm: RealVllm, mark: str, tmp_path: Path) -> None:
    """A cold request for an adapter brings its base; the next adapter displaces it. While vLLM serves, adapters are
    loaded, listed, displaced and unloaded, and a client with the engine's key cannot do that."""
    first, second = (tiny_adapter(tmp_path / name, real_vllm.tiny) for name in ("first", "second"))
    vllm = {
        "command": real_vllm.command,
        "extra_args": ["--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "256"],
        "env": {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        "port_range": [28400, 28449],
        "spare": False,  # there is no second load
    }
    async with neuron_here(config_of(tmp_path / "state", harness={"vllm": vllm})) as neuron:
        models: list[dict[str, Any]] = [
            {"id": BASE, "source": str(real_vllm.tiny), "vram_mb": 2000, "max_loras": 1},
            {"id": "a", "base": BASE, "lora": first},
            {"id": "b", "base": BASE, "lora": second},
        ]
        async with cortex_process(tmp_path, [ListedNeuron("n", neuron.base)], models) as cortex:
            for name in ("b", BASE, "a"):
                body = {"model": name, "prompt": "hello", "max_tokens": 2}
                async with neuron.session.post(f"{cortex.url}/v1/completions", json=body) as response:
                    answer = await response.json()
                    assert (response.status, answer.get("model")) == (200, name), answer
        assert (await neuron.model(BASE))["adapters"] == ["a"]
        assert [await ask(neuron, name) for name in ("a", "b")] == [200, 404]
        refused = await attach(neuron, "b", second)
        assert refused.error["code"] == "adapters_full"
        assert (await attach(neuron, "b", second, displaceable=["a"])).body["adapters"] == {"0": ["b"]}
        assert [await ask(neuron, name) for name in ("a", "b", BASE)] == [404, 200, 200]
        assert await ask(neuron, "", "/v1/unload_lora_adapter", lora_name="b") == 404
        assert (await detach(neuron, "b")).status == 200
        assert await ask(neuron, "b") == 404
