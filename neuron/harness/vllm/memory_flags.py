"""vLLM's flags that decide about its memory, read as vLLM reads them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from neuron.estimate.options import EngineOptions, human_number, length_of
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol.reserved_arguments import CONTEXT_FLAG

UTILIZATION = ("--gpu-memory-utilization", "--device-memory-utilization")
SIZES_MEMORY = (*UTILIZATION, "--kv-cache-memory-bytes")
_SHORT = {"-q": "--quantization"}
_ALIASES = {"--device-memory-utilization": "--gpu-memory-utilization"}
_VALUED = frozenset(
    {
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-dtype", "--cpu-offload-gb"),
        *("--kv-cache-memory-bytes", "--dtype", "--quantization", "--gpu-memory-utilization", "--revision"),
        *("--download-dir", "--runner", "--convert"),
    }
)
# They take memory, or change what is counted, in ways that the estimate ignores.
_NOT_COUNTED = (
    "--speculative-config",
    "--enable-lora",
    "--hf-overrides",
    "--decode-context-parallel-size",
)


def options_of(spec: EngineSpec) -> EngineOptions:
    """What the spec and its arguments ask for. When a flag is repeated, the last one counts.

    Raises:
        InvalidRequest: an argument that must be a number is not one.
    """
    given = dict(_flags(spec.args))
    utilization = _fraction(given, "--gpu-memory-utilization")
    return EngineOptions(
        max_model_len=spec.context or _context_in(given),
        max_num_seqs=_whole(given, "--max-num-seqs"),
        max_num_batched_tokens=_whole(given, "--max-num-batched-tokens"),
        kv_cache_dtype=given.get("--kv-cache-dtype", "auto"),
        kv_cache_bytes=_whole(given, "--kv-cache-memory-bytes"),
        dtype=given.get("--dtype", "auto").lower(),
        quantization=given.get("--quantization", spec.quant),
        memory_fraction=utilization,
        cpu_offload_gib=_fraction(given, "--cpu-offload-gb") or 0.0,
        eager=given.get("--enforce-eager", "false").lower() != "false",
        pooling=given.get("--runner") == "pooling" or given.get("--convert") in ("embed", "classify"),
        revision=given.get("--revision"),
        download_dir=given.get("--download-dir"),
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        data_parallel=spec.data_parallel,
        expert_parallel=spec.expert_parallel,
        not_counted=tuple(flag for flag in _NOT_COUNTED if flag in given),
    )


def _context_in(given: Mapping[str, str]) -> int | None:
    return length_of(given[CONTEXT_FLAG], "args") if CONTEXT_FLAG in given else None


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags, written with dashes, and their values; a switch has the value `true`, its `--no-` form `false`."""
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name).replace("_", "-") if name.startswith("-") else name
        name = _ALIASES.get(name, name)
        if name in _VALUED:
            yield name, value if equals else next(words, "")
        elif name.startswith("--no-"):
            yield f"--{name.removeprefix('--no-')}", "false"
        elif name.startswith("--"):
            yield name.partition(".")[0], value if equals else "true"


def _whole(given: Mapping[str, str], flag: str) -> int | None:
    return human_number(given[flag], flag, "args") if flag in given else None


def _fraction(given: Mapping[str, str], flag: str) -> float | None:
    text = given.get(flag)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{0,9}(?:\.[0-9]{0,9})?", text) is None or not text.strip("."):
        raise InvalidRequest(f"{flag}: must be a number, got {text[:80]!r}", param="args")
    return float(text)
