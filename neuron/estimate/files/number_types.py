"""Bits of the number types that engine flags and model configurations name. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPE_BITS = {"half": 16, "float16": 16, "bfloat16": 16, "float": 32, "float32": 32, "float64": 64}
"""`--dtype`, and `dtype` of a config.json. Models published with 32 or 64 bits are served with 16 by default."""

KV_BITS = {
    **{"float16": 16.0, "bfloat16": 16.0},
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla"), 8.0),
    **{"int8_per_token_head": 8.0, "fp8_per_token_head": 8.0, "int4_per_token_head": 4.0},
    **{"nvfp4": 4.5, "nvfp4_4over6": 4.5, "nvfp4_ds_mla": 4.5},  # 4 bits, and 8 of scale for every 16 numbers
    **{"turboquant_k8v4": 6.0, "turboquant_4bit_nc": 4.0, "turboquant_k3v4_nc": 3.5, "turboquant_3bit_nc": 3.0},
    **{"ultraquant_4bit": 4.0},
}
"""`--kv-cache-dtype`; `auto` is the model's own type."""
SCALED_PER_HEAD = frozenset({"int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"})
"""Types of the KV cache with a 32-bit scale for the key and one for the value of each token and head."""

ON_LOADING = {
    **dict.fromkeys(("fp8", "fp8_per_tensor", "fp8_per_channel", "fbgemm_fp8", "experts_int8"), 8.0),
    **{"fp8_per_block": 8.0, "int8_per_channel_weight_only": 8.0, "mxfp8": 8.25},
    **{"mxfp4": 4.25, "nvfp4_per_token": 4.5, "bitsandbytes": 4.5},
}
"""`--quantization` methods that quantize a plain checkpoint while it is loaded: bits of a number with its share of the
scales. All other methods need a quantized checkpoint."""
EXPERTS_ONLY = frozenset({"experts_int8", "moe_wna16", "mxfp4", "gpt_oss_mxfp4"})
"""Methods that quantize the experts only."""


def model_bits(asked: str, published: str | None) -> int:
    """Bits of a plain number once the model is loaded; `asked` is the engine's `--dtype`."""
    if asked != "auto":
        return DTYPE_BITS.get(asked, 16)
    return min(DTYPE_BITS.get(published or "", 16), 16)


def checkpoint_method(quantization: Mapping[str, Any]) -> str:
    """The name of a checkpoint's quantization method."""
    method = quantization.get("quant_method") or quantization.get("quant_algo") or "an unnamed method"
    return str(method).lower()


def checkpoint_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of a quantized number with its share of the scales, from `quantization_config`; None when unknown."""
    method = checkpoint_method(quantization)
    if "fp8" in method:
        return 8.0
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return 4.25
    if method == "bitsandbytes":
        return 4.5 if quantization.get("load_in_4bit") else 8.0
    bits = _first_bits(quantization)
    if bits is None:
        return None
    group = quantization.get("group_size", 128)
    # A 16-bit scale and a packed zero point for each group.
    return bits + ((16 + bits) / group if isinstance(group, int) and group > 0 else 0)


def kv_cache_name(asked: str, quantization: Mapping[str, Any] | None) -> str:
    """`--kv-cache-dtype` with `auto` resolved: a quantized checkpoint may define an 8-bit KV cache."""
    if asked != "auto" or quantization is None:
        return asked
    inner = quantization.get("quantization")
    for values in (quantization, inner if isinstance(inner, dict) else {}):
        scheme = values.get("kv_cache_scheme") or values.get("kv_cache_quant_algo")
        if isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
            return "fp8"
        if isinstance(scheme, str) and scheme.upper() in ("FP8", "NVFP4"):
            return scheme.lower()
    return asked


def _first_bits(quantization: Mapping[str, Any]) -> int | None:
    candidates = [quantization.get("bits"), quantization.get("w_bit")]
    groups = quantization.get("config_groups")  # compressed-tensors
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        candidates.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((bits for bits in candidates if isinstance(bits, int) and 1 <= bits <= 16), None)
