"""The memory of a vLLM, summed up from a model, its options and a host's devices. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neuron.estimate.estimator import MemoryEstimator
from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.number_types import kv_cache_name, model_bits
from neuron.estimate.files.parameters import Part
from neuron.estimate.options import EngineOptions
from neuron.estimate.result import GIB, MIB, Estimate, Line, Option, line_of, unknown_line
from neuron.estimate.weights import ModelFiles, Weights, weights_of
from neuron.harness.vllm.estimate.context_length import default_length, longest
from neuron.harness.vllm.estimate.kv_cache import Cached, Sequences, cached_of, unknown_of
from neuron.harness.vllm.estimate.overhead import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    Batching,
    activation_bytes,
    batching_of,
    graph_bytes,
)
from neuron.harness.vllm.estimate.parallel import obstacle
from neuron.harness.vllm.memory_flags import options_of
from neuron.spec import EngineSpec
from shared.gpus import DEFAULT_ENGINE_SHARE
from shared.protocol import Device

FULL_SEQUENCES = 1
"""Sequences of the whole length that fit by default. vLLM does not start with fewer; several shorter ones replace
one."""
_LOOKED_AT = 8  # numbers of devices to try, also on a host with fewer: to show what would do


@dataclass(frozen=True)
class _Case:
    """The input that does not depend on the number of devices."""

    model: Architecture
    options: EngineOptions
    weights: Weights
    batching: Batching
    sequences: Sequences
    kv_dtype: str
    bits: int


class VllmEstimator(MemoryEstimator):
    """The rules of vLLM 0.32."""

    usable_share = DEFAULT_ENGINE_SHARE

    def options_of(self, spec: EngineSpec) -> EngineOptions:
        return options_of(spec)

    def estimate(self, model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> Estimate:
        return estimate(model, options, devices)


def estimate(model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> Estimate:
    """See `MemoryEstimator.estimate`."""
    case = _case_of(model, options, devices)
    usable = sorted((device.vram_total_mb for device in devices if device.lost is None), reverse=True)
    looked_at = range(1, max(len(usable), options.tensor_parallel or 1, _LOOKED_AT) + 1)
    splits = tuple(_option(case, number, usable) for number in looked_at)
    fitting = next((split.tensor_parallel for split in splits if split.fits), None)
    split_over = options.tensor_parallel or fitting or 1
    return Estimate(
        source=model.source,
        architecture=model.architecture.name or model.architecture.model_type,
        basis=case.weights.how,
        max_model_len=case.sequences.tokens,
        sequences=case.sequences.count,
        split_over=split_over,
        host_devices=len(usable),
        lines=tuple(_lines(case, split_over)),
        options=splits,
        notes=tuple(_notes(case)),
    )


def _case_of(model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> _Case:
    architecture = model.architecture
    first = next((device for device in devices if device.lost is None), Device(index=0))
    length = options.max_model_len or default_length(architecture.text)
    batching = batching_of(options, max_model_len=length, device_mb=first.vram_total_mb, device_name=first.name)
    count = options.full_sequences or min(FULL_SEQUENCES, batching.sequences)
    return _Case(
        model=architecture,
        options=options,
        weights=weights_of(architecture, model.stored, dtype=options.dtype, quantization=options.quantization),
        batching=batching,
        sequences=Sequences(count=count, tokens=length, batched_tokens=batching.tokens),
        kv_dtype=kv_cache_name(options.kv_cache_dtype, architecture.quantization),
        bits=model_bits(options.dtype, architecture.dtype),
    )


def _option(case: _Case, devices: int, usable: Sequence[int]) -> Option:
    needed = sum(line.device_mb or 0 for line in _lines(case, devices))
    reason = obstacle(case.model, devices)
    if reason is not None:
        return Option(devices, needed, possible=False, reason=reason)
    if devices > len(usable):
        reason = f"this host has {len(usable) or 'no'} usable device{'' if len(usable) == 1 else 's'}"
    else:
        share = DEFAULT_ENGINE_SHARE if case.options.memory_fraction is None else case.options.memory_fraction
        available = int(usable[devices - 1] * share)
        if needed > available:
            reason = f"more than the usable {available} MiB of {usable[devices - 1]}"
    return Option(devices, needed, possible=True, reason=reason)


def _lines(case: _Case, devices: int) -> Iterator[Line]:
    yield from _weight_lines(case, devices)
    yield from _cache_lines(case, devices)
    activations = activation_bytes(
        case.model, case.batching, bits=case.bits, devices=devices, pooling=case.options.pooling
    )
    batch = f"peak for {case.batching.tokens:,} tokens of {case.batching.sequences:,} sequences in one step"
    yield line_of("activations", activations, devices, batch)
    graphs = graph_bytes(case.model, case.options)
    yield line_of("CUDA graphs", graphs, devices, f"{case.model.layers} layers" if graphs else "none are captured")
    yield line_of("CUDA context", CONTEXT_BYTES, devices, "context, libraries, kernels")
    if devices > 1:
        yield line_of("communication", COMMUNICATION_BYTES, devices, f"NCCL and all-reduce between {devices} devices")
    for what in _unknown(case):
        yield unknown_line(what)


def _weight_lines(case: _Case, devices: int) -> Iterator[Line]:
    loaded = 0.0
    for part in case.weights.parts():
        size = case.weights.on_each_device(part, devices, case.model.kv_heads)
        loaded += size
        yield line_of(f"weights: {part.value}", size, devices, _where(part, devices))
    offloaded = min(loaded, case.options.cpu_offload_gib * GIB)
    if offloaded:
        mib = int(offloaded / MIB)
        yield Line("weights: in host memory", -mib, -mib * devices, "--cpu-offload-gb, for each device")


def _where(part: Part, devices: int) -> str:
    if devices == 1:
        return "on the device"
    return "on every device" if part is Part.SMALL else "split over the devices"


def _cache_lines(case: _Case, devices: int) -> Iterator[Line]:
    if case.model.encoder_only:
        yield Line("KV cache", 0, 0, "none: encoders have no KV cache")
        return
    cached = cached_of(case.model, case.sequences, dtype=case.kv_dtype, model_bits=case.bits, devices=devices)
    if case.options.kv_cache_bytes is not None:
        yield line_of("KV cache", case.options.kv_cache_bytes, devices, _room(case, cached))
        return
    if not cached:
        yield Line("KV cache", 0, 0, "none of known size")
    for each in cached:
        yield line_of(f"KV cache: {each.kind.value}", each.size, devices, f"{each.how}, {_type_name(case)}")


def _room(case: _Case, cached: Sequence[Cached]) -> str:
    text = "--kv-cache-memory-bytes, on each device"
    needed = sum(each.size for each in cached)
    if not needed or case.options.kv_cache_bytes is None:
        return text
    fitting = case.options.kv_cache_bytes / needed * case.sequences.count
    return f"{text}: fits {fitting:.2f} sequences of {case.sequences.tokens:,} tokens"


def _type_name(case: _Case) -> str:
    return f"{case.bits} bits" if case.kv_dtype == "auto" else case.kv_dtype


def _unknown(case: _Case) -> Iterator[str]:
    yield from case.weights.unknown
    yield from unknown_of(case.model, case.kv_dtype)
    if not case.model.vocabulary and not case.model.encoder_only:
        yield "activations of the sampler: config.json has no vocab_size"
    if case.model.other_parts:
        yield "activations of images or audio: vLLM tries the largest ones when it starts"
    for flag in case.options.not_counted:
        yield f"{flag}: its effect on memory"


def _notes(case: _Case) -> Iterator[str]:
    most, tokens = longest(case.model.text), case.sequences.tokens
    if tokens > most:
        yield f"max_model_len {tokens} is more than the model's {most}, which vLLM refuses by default"
    method = case.options.quantization
    if method is not None and case.model.quantization is not None:
        yield f"quantization {method}: ignored, the checkpoint is already quantized"
