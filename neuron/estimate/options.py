"""What a model is to be served with, and the options of `neuron estimate` and `GET /estimate` that change it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from neuron.estimate.files.number_types import KV_BITS
from shared.errors import InvalidRequest
from shared.protocol.parallel import MAX_DEVICES

_SIZES = ("tensor_parallel", "pipeline_parallel", "data_parallel")
OPTIONS = ("max_model_len", "max_num_seqs", *_SIZES, "quant", "kv_cache_dtype")
_MAX_SEQUENCES = 1 << 20
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MOST = 1 << 50


@dataclass(frozen=True)
class EngineOptions:
    """What a model is to be served with, as far as its memory depends on it. `kv_cache_bytes` is per device."""

    max_model_len: int | None = None  # tokens; None: the model's own
    full_sequences: int | None = None  # sequences of that length that fit at once; None: the engine's minimum
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    memory_fraction: float | None = None  # of each device
    cpu_offload_gib: float = 0.0
    eager: bool = False  # no CUDA graphs
    pooling: bool = False
    revision: str | None = None
    download_dir: str | None = None
    tensor_parallel: int | None = None  # None: the smallest that fits
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    not_counted: tuple[str, ...] = field(default=())  # arguments whose effect the estimate ignores


def with_options(served: EngineOptions, options: Mapping[str, str]) -> EngineOptions:
    """`served`, changed by `options`; `max_num_seqs` also asks that so many sequences of the whole length fit.

    Raises:
        InvalidRequest: names the option and its value.
    """
    changed = served
    if "max_model_len" in options:
        changed = replace(changed, max_model_len=length_of(options["max_model_len"], "max_model_len"))
    if "max_num_seqs" in options:
        count = _number(options["max_num_seqs"], "max_num_seqs", _MAX_SEQUENCES)
        changed = replace(changed, max_num_seqs=count, full_sequences=count)
    sizes = {name: _number(options[name], name, MAX_DEVICES) for name in _SIZES if name in options}
    changed = replace(changed, **sizes)  # type: ignore[arg-type]
    devices = (changed.tensor_parallel or 1) * changed.pipeline_parallel * changed.data_parallel
    if devices > MAX_DEVICES:
        name = next(iter(sizes), "model")
        raise InvalidRequest(f"{name}: {devices} devices in all, at most {MAX_DEVICES} are possible", param=name)
    if "kv_cache_dtype" in options:
        name = options["kv_cache_dtype"]
        if name != "auto" and name not in KV_BITS:
            names = ", ".join(("auto", *KV_BITS))
            raise InvalidRequest(f"kv_cache_dtype: must be one of {names}, got {name[:80]!r}", param="kv_cache_dtype")
        changed = replace(changed, kv_cache_dtype=name)
    return replace(changed, quantization=options["quant"]) if "quant" in options else changed


def _number(text: str, name: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)) or not 1 <= int(text) <= most:
        raise InvalidRequest(f"{name}: must be a number from 1 to {most}, got {text[:80]!r}", param=name)
    return int(text)


def length_of(text: str, param: str) -> int | None:
    """A context length: 32768, 32k (thousands), 32K (1024s); `auto` or -1 for the model's own (None).

    Raises:
        InvalidRequest: names `param` and the value.
    """
    if text.lower() == "auto" or text == "-1":
        return None
    return human_number(text, "max_model_len" if param != "args" else "--max-model-len", param)


def human_number(text: str, name: str, param: str) -> int:
    """A whole number from 1 to 2**50, with a unit if any; fractions with the decimal units only.

    Raises:
        InvalidRequest: names `name` and the value.
    """
    match = re.fullmatch(r"([0-9]{1,16})(\.[0-9]{1,9})?([kKmMgGtT]?)", text.strip())
    if match is None or (match[2] and match[3] not in tuple("kmgt")):
        raise InvalidRequest(f"{name}: must be a number such as 32768, 32k or 32K, got {text[:80]!r}", param=param)
    unit = _UNITS.get(match[3], 1)
    number = int(float(match[1] + match[2]) * unit) if match[2] else int(match[1]) * unit
    if not 1 <= number <= _MOST:
        raise InvalidRequest(f"{name}: must be between 1 and 2**50, got {text[:80]!r}", param=param)
    return number
