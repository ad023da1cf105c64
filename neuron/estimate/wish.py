"""What is asked of an engine, as far as memory depends on it: vLLM's flags, read as vLLM reads them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from neuron.spec import EngineSpec
from shared.errors import InvalidRequest

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MOST = 1 << 50
_SHORT = {"-q": "--quantization"}
_ALIASES = {"--device-memory-utilization": "--gpu-memory-utilization"}
_VALUED = frozenset(
    {
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-dtype", "--cpu-offload-gb"),
        *("--kv-cache-memory-bytes", "--dtype", "--quantization", "--gpu-memory-utilization", "--revision"),
        *("--download-dir", "--runner", "--convert"),
    }
)
# What takes memory, or changes what is counted, in ways that are not counted here.
_NOT_COUNTED = (
    "--speculative-config",
    "--enable-lora",
    "--hf-overrides",
    "--pipeline-parallel-size",
    "--data-parallel-size",
    "--enable-expert-parallel",
    "--decode-context-parallel-size",
)


@dataclass(frozen=True)
class Wish:
    """`full_sequences` is how many sequences of the whole length have room at once, None: as the default says.

    `tensor_parallel` None: the smallest that fits. `kv_cache_bytes` is of each device.
    """

    max_model_len: int | None = None  # tokens; None: the model's own
    full_sequences: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    gpu_memory_utilization: float | None = None
    cpu_offload_gib: float = 0.0
    enforce_eager: bool = False
    pooling: bool = False
    revision: str | None = None
    download_dir: str | None = None
    tensor_parallel: int | None = None
    not_counted: tuple[str, ...] = field(default=())


def wish_of(spec: EngineSpec) -> Wish:
    """What the spec and its arguments say. Of a flag that is given twice the last one counts.

    Raises:
        InvalidRequest: a number among the arguments is none.
    """
    given = dict(_flags(spec.args))
    utilization = _fraction(given, "--gpu-memory-utilization")
    return Wish(
        max_model_len=length_of(given["--max-model-len"], "args") if "--max-model-len" in given else None,
        max_num_seqs=_whole(given, "--max-num-seqs"),
        max_num_batched_tokens=_whole(given, "--max-num-batched-tokens"),
        kv_cache_dtype=given.get("--kv-cache-dtype", "auto"),
        kv_cache_bytes=_whole(given, "--kv-cache-memory-bytes"),
        dtype=given.get("--dtype", "auto").lower(),
        quantization=given.get("--quantization", spec.quant),
        gpu_memory_utilization=utilization,
        cpu_offload_gib=_fraction(given, "--cpu-offload-gb") or 0.0,
        enforce_eager=given.get("--enforce-eager", "false").lower() != "false",
        pooling=given.get("--runner") == "pooling" or given.get("--convert") in ("embed", "classify"),
        revision=given.get("--revision"),
        download_dir=given.get("--download-dir"),
        tensor_parallel=spec.tensor_parallel,
        not_counted=tuple(flag for flag in _NOT_COUNTED if flag in given),
    )


def length_of(text: str, param: str) -> int | None:
    """`--max-model-len`: 32768, 32k (thousands), 32K (1024s), `auto` or -1 for the model's own (None).

    Raises:
        InvalidRequest: it is none of these; `param` is the field to name.
    """
    if text.lower() == "auto" or text == "-1":
        return None
    return human_number(text, "max_model_len" if param != "args" else "--max-model-len", param)


def human_number(text: str, name: str, param: str) -> int:
    """A whole number of at least 1 as vLLM's flags take it; fractions with the decimal units only.

    Raises:
        InvalidRequest: naming `name` and the value.
    """
    match = re.fullmatch(r"([0-9]{1,16})(\.[0-9]{1,9})?([kKmMgGtT]?)", text.strip())
    if match is None or (match[2] and match[3] not in tuple("kmgt")):
        raise InvalidRequest(f"{name}: {text[:80]!r} is no number such as 32768, 32k or 32K", param=param)
    unit = _UNITS.get(match[3], 1)
    number = int(float(match[1] + match[2]) * unit) if match[2] else int(match[1]) * unit
    if not 1 <= number <= _MOST:
        raise InvalidRequest(f"{name}: {text[:80]!r} is not between 1 and 2**50", param=param)
    return number


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags with dashes and their values; a switch has the value `true`, its `--no-` form `false`."""
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
        raise InvalidRequest(f"{flag}: {text[:80]!r} is no number", param="args")
    return float(text)
