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
from neuron.harness.vllm.estimate.kv_cache import Sequences, cached_of, unknown_of
from neuron.harness.vllm.estimate.overhead import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    CPU_PROCESSES_MB,
    Batching,
    activation_bytes,
    batching_of,
    graph_bytes,
)
from neuron.harness.vllm.estimate.parallel import obstacle
from neuron.harness.vllm.memory_flags import options_of
from neuron.spec import EngineSpec
from shared.gpus import DEFAULT_ENGINE_SHARE
from shared.protocol import Device, Parallelism

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

    def split(self, tensor: int) -> Parallelism:
        options = self.options
        return Parallelism.model_construct(
            tensor=tensor,
            pipeline=options.pipeline_parallel,
            data=options.data_parallel,
            expert=options.expert_parallel,
        )

    def on_stage(self, split: Parallelism) -> float:
        """Fraction of the layers on the pipeline stage with the most."""
        layers = max(1, self.model.layers)
        return -(-layers // split.pipeline) / layers


class VllmEstimator(MemoryEstimator):
    """The rules of vLLM 0.32."""

    usable_share = DEFAULT_ENGINE_SHARE
    in_ram_mb = CPU_PROCESSES_MB

    def options_of(self, spec: EngineSpec) -> EngineOptions:
        return options_of(spec)

    def estimate(self, model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> Estimate:
        return estimate(model, options, devices)


def estimate(model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> Estimate:
    """See `MemoryEstimator.estimate`."""
    case = _case_of(model, options, devices)
    single = sorted((device.vram_total_mb for device in devices if device.usable), reverse=True)
    gpus = [device for device in devices if device.usable and not device.is_mig_instance]
    together = sorted((device.vram_total_mb for device in gpus), reverse=True)
    looked_at = range(1, max(len(single), options.tensor_parallel or 1, _LOOKED_AT) + 1)
    splits = tuple(
        _option(case, split, single if split.devices == 1 else together) for split in map(case.split, looked_at)
    )
    fitting = next((split.tensor_parallel for split in splits if split.fits), None)
    split = case.split(options.tensor_parallel or fitting or 1)
    return Estimate(
        source=model.source,
        architecture=model.architecture.name or model.architecture.model_type,
        basis=case.weights.how,
        max_model_len=case.sequences.tokens,
        sequences=case.sequences.count,
        parallel=split,
        host_devices=len(single),
        lines=tuple(_lines(case, split)),
        options=splits,
        notes=tuple(_notes(case)),
    )


def _case_of(model: ModelFiles, options: EngineOptions, devices: Sequence[Device]) -> _Case:
    architecture = model.architecture
    first = next((device for device in devices if device.usable), Device(index=0))
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


def _option(case: _Case, split: Parallelism, usable: Sequence[int]) -> Option:
    needed = sum(line.device_mb or 0 for line in _lines(case, split))
    reason, devices = obstacle(case.model, split), split.devices
    if reason is not None:
        return Option(split.tensor, needed, possible=False, reason=reason)
    if devices > len(usable):
        reason = f"this host has {len(usable) or 'no'} usable device{'' if len(usable) == 1 else 's'}"
    else:
        share = DEFAULT_ENGINE_SHARE if case.options.memory_fraction is None else case.options.memory_fraction
        available = int(usable[devices - 1] * share)
        if needed > available:
            reason = f"more than the usable {available} MiB of {usable[devices - 1]}"
    return Option(split.tensor, needed, possible=True, reason=reason)


def _lines(case: _Case, split: Parallelism) -> Iterator[Line]:
    devices = split.devices
    yield from _weight_lines(case, split)
    yield from _cache_lines(case, split)
    activations = activation_bytes(
        case.model, case.batching, bits=case.bits, devices=split.tensor, pooling=case.options.pooling
    )
    batch = f"peak for {case.batching.tokens:,} tokens of {case.batching.sequences:,} sequences in one step"
    yield line_of("activations", activations, devices, batch)
    graphs = graph_bytes(case.model, case.options) * case.on_stage(split)
    captured = round(case.model.layers * case.on_stage(split))
    yield line_of("CUDA graphs", graphs, devices, f"{captured} layers" if graphs else "none are captured")
    yield line_of("CUDA context", CONTEXT_BYTES, devices, "context, libraries, kernels")
    if devices > 1:
        yield line_of("communication", COMMUNICATION_BYTES, devices, f"NCCL and all-reduce between {devices} devices")
    for what in _unknown(case):
        yield unknown_line(what)


def _weight_lines(case: _Case, split: Parallelism) -> Iterator[Line]:
    loaded = 0.0
    for part in case.weights.parts():
        over = split.tensor * split.data if part is Part.EXPERTS else split.tensor
        size = case.weights.on_each_device(part, over, case.model.kv_heads) * _on_stage(case, part, split)
        loaded += size
        yield line_of(f"weights: {part.value}", size, split.devices, _where(part, split))
    offloaded = min(loaded, case.options.cpu_offload_gib * GIB)
    if offloaded:
        mib = int(offloaded / MIB)
        yield Line("weights: in host memory", -mib, -mib * split.devices, "--cpu-offload-gb, for each device")


def _on_stage(case: _Case, part: Part, split: Parallelism) -> float:
    """Fraction of a part on the pipeline stage with the most of it. The embeddings are on the first and the output head
    on the last, which needs the embeddings too if it is tied to them; encoders are on the first."""
    if split.pipeline == 1 or part is Part.ENCODERS:
        return 1.0
    if part is Part.EMBEDDING:
        return 1.0 if case.model.tied else 0.5
    return case.on_stage(split)


def _where(part: Part, split: Parallelism) -> str:
    if split.devices == 1:
        return "on the device"
    if split.tensor_groups == 1:
        return "on every device" if part is Part.SMALL else "split over the devices"
    stages = "" if split.pipeline == 1 else f" and {split.pipeline} stages"
    if part is Part.EXPERTS:
        return f"split over {split.tensor * split.data} devices{stages}"
    over = "on every device" if part is Part.SMALL else f"split over {split.tensor} device{'s'[: split.tensor > 1]}"
    return f"{over}{stages}" + (f", in each of {split.data} copies" if split.data > 1 else "")


def _cache_lines(case: _Case, split: Parallelism) -> Iterator[Line]:
    if case.model.encoder_only:
        yield Line("KV cache", 0, 0, "none: encoders have no KV cache")
        return
    cached = cached_of(case.model, case.sequences, dtype=case.kv_dtype, model_bits=case.bits, devices=split.tensor)
    on_stage = case.on_stage(split)
    if case.options.kv_cache_bytes is not None:
        how = _room(case, sum(each.size for each in cached) * on_stage)
        yield line_of("KV cache", case.options.kv_cache_bytes, split.devices, how)
        return
    if not cached:
        yield Line("KV cache", 0, 0, "none of known size")
    stages = "" if split.pipeline == 1 else f", {split.pipeline} stages"
    for each in cached:
        how = f"{each.how}, {_type_name(case)}{stages}"
        yield line_of(f"KV cache: {each.kind.value}", each.size * on_stage, split.devices, how)


def _room(case: _Case, needed: float) -> str:
    text = "--kv-cache-memory-bytes, on each device"
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
