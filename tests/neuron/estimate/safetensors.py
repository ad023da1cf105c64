"""Writes safetensors files: 8 bytes of length, a JSON header, the tensors' bytes (a hole in the file)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron.estimate.files.safetensors_header import BITS

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write_tensors(path: Path, tensors: Shapes) -> None:
    """Writes a complete file; name -> (type, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    write_header(path, header, data_bytes=end)


def write_header(path: Path, header: Any, *, data_bytes: int = 0) -> None:
    """Writes a file with any header and `data_bytes` bytes after it."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + data_bytes)


def write_model(directory: Path, config: Mapping[str, Any], *shards: Shapes) -> Path:
    """Writes a model's directory: config.json, and the shards with an index if there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if len(shards) == 1:
        write_tensors(directory / "model.safetensors", shards[0])
    elif shards:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(directory / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def llama_tensors(config: Mapping[str, Any], *, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama-like checkpoint with this configuration."""
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    wide, words = config["intermediate_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": (dtype, (words, hidden)), "model.norm.weight": (dtype, (hidden,))}
    for number in range(config["num_hidden_layers"]):
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (heads * head, hidden),
            "self_attn.k_proj": (kv * head, hidden),
            "self_attn.v_proj": (kv * head, hidden),
            "self_attn.o_proj": (hidden, heads * head),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors |= {f"model.layers.{number}.{name}.weight": (dtype, shape) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = (dtype, (words, hidden))
    return tensors
