"""What may be wanted otherwise: options of `neuron estimate`, parameters of `GET /estimate`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neuron.estimate.files.number_types import KV_BITS
from neuron.estimate.wish import Wish, length_of
from shared.errors import InvalidRequest

OPTIONS = ("max_model_len", "max_num_seqs", "tensor_parallel", "quant", "kv_cache_dtype")
_MAX_TENSOR_PARALLEL = 64
_MAX_SEQUENCES = 1 << 20


def with_options(wish: Wish, options: Mapping[str, str]) -> Wish:
    """`wish` with what `options` say instead; `max_num_seqs` asks for room for as many at their whole length.

    Raises:
        InvalidRequest: naming the option and its value.
    """
    changed = wish
    if "max_model_len" in options:
        changed = replace(changed, max_model_len=length_of(options["max_model_len"], "max_model_len"))
    if "max_num_seqs" in options:
        count = _number(options["max_num_seqs"], "max_num_seqs", _MAX_SEQUENCES)
        changed = replace(changed, max_num_seqs=count, full_sequences=count)
    if "tensor_parallel" in options:
        changed = replace(
            changed, tensor_parallel=_number(options["tensor_parallel"], "tensor_parallel", _MAX_TENSOR_PARALLEL)
        )
    if "kv_cache_dtype" in options:
        name = options["kv_cache_dtype"]
        if name != "auto" and name not in KV_BITS:
            names = ", ".join(("auto", *KV_BITS))
            raise InvalidRequest(f"kv_cache_dtype: {name[:80]!r} is none of {names}", param="kv_cache_dtype")
        changed = replace(changed, kv_cache_dtype=name)
    return replace(changed, quantization=options["quant"]) if "quant" in options else changed


def _number(text: str, name: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)) or not 1 <= int(text) <= most:
        raise InvalidRequest(f"{name}: {text[:80]!r} is no number from 1 to {most}", param=name)
    return int(text)
