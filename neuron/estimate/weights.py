"""Bytes of a model's weights on each device. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.layers import LayerKind
from neuron.estimate.files.number_types import (
    EXPERTS_ONLY,
    ON_LOADING,
    checkpoint_bits,
    checkpoint_method,
    model_bits,
)
from neuron.estimate.files.parameters import Part, WeightPlacement, counts_of, parameter_count
from neuron.estimate.files.stored import Amount, Group, StoredWeights


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it."""

    source: str
    architecture: Architecture
    stored: StoredWeights | None  # None: there are no safetensors files


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one part with the same placement; `size` in bytes, each weight counted once."""

    part: Part
    placement: WeightPlacement
    size: float


@dataclass(frozen=True)
class Weights:
    """All weights as loaded. `how` names the source of the sizes; `unknown` lists what they miss."""

    groups: tuple[WeightGroup, ...]
    how: str
    unknown: tuple[str, ...] = ()

    def parts(self) -> tuple[Part, ...]:
        """The parts that exist, in the order of `Part`."""
        present = {group.part for group in self.groups}
        return tuple(part for part in Part if part in present)

    def on_each_device(self, part: Part, devices: int, kv_heads: int) -> float:
        """Bytes of a part on one of `devices`."""
        return sum(_share(group, devices, kv_heads) for group in self.groups if group.part is part)


def weights_of(model: Architecture, stored: StoredWeights | None, *, dtype: str, quantization: str | None) -> Weights:
    """The weights of `model` once loaded; `dtype` and `quantization` are the engine's options.

    From the tensors' sizes if there are safetensors files, else from the parameters that the configuration implies,
    times the bits of their type.
    """
    bits = model_bits(dtype, model.dtype)
    method = quantization if model.quantization is None else None
    unknown = tuple(_unusable(method))
    if stored is not None:
        groups = tuple(
            WeightGroup(group.part, group.placement, _loaded(group, amount, bits, method, model.quantization))
            for group, amount in stored.amounts.items()
        )
        return Weights(groups, _how_stored(stored, model, bits, method), unknown)
    return Weights(tuple(_counted(model, bits, method)), _how_counted(model, bits, method), unknown + _uncounted(model))


def _share(group: WeightGroup, devices: int, kv_heads: int) -> float:
    if group.placement is WeightPlacement.WHOLE:
        return group.size
    if group.placement is WeightPlacement.BY_KV_HEAD:
        return group.size / min(devices, kv_heads or devices)
    return group.size / devices


def _loaded(group: Group, amount: Amount, bits: int, method: str | None, checkpoint: Mapping[str, Any] | None) -> float:
    if checkpoint is not None:  # its scales keep their type, and the rest has 16 bits already
        return amount.stored_bytes
    return amount.floats * _bits(group, bits, method) / 8 + amount.stored_bytes - amount.float_bytes


def _bits(group: Group, bits: int, method: str | None) -> float:
    """Bits of a plain number after loading: quantization applies to matrices, not to embeddings, norms and the head."""
    if method not in ON_LOADING or not group.matrices:
        return bits
    if method in EXPERTS_ONLY and group.part is not Part.EXPERTS:
        return bits
    return ON_LOADING[method]


def _counted(model: Architecture, bits: int, method: str | None) -> Iterator[WeightGroup]:
    for count in counts_of(model):
        group = Group(count.part, count.placement, count.matrices)
        each = _bits(group, bits, method)
        if model.quantization is not None and count.matrices:
            whole = checkpoint_method(model.quantization) in EXPERTS_ONLY and count.part is not Part.EXPERTS
            each = bits if whole else checkpoint_bits(model.quantization) or bits
        yield WeightGroup(count.part, count.placement, count.parameters * each / 8)


def _how_stored(stored: StoredWeights, model: Architecture, bits: int, method: str | None) -> str:
    files = f"{stored.files} safetensors file{'' if stored.files == 1 else 's'}"
    if model.quantization is not None:
        return f"sizes in {files}, quantised with {checkpoint_method(model.quantization)}"
    text = f"sizes in {files}, {bits} bits a number once loaded"
    if method in ON_LOADING:
        text += f", {method} for the matrices"
    return text


def _how_counted(model: Architecture, bits: int, method: str | None) -> str:
    text = f"{parameter_count(model) / 1e9:.2f} billion parameters counted from config.json, {bits} bits each"
    if model.quantization is not None:
        text += f", matrices as {checkpoint_method(model.quantization)}"
    elif method in ON_LOADING:
        text += f", {method} for the matrices"
    return text


def _unusable(method: str | None) -> Iterator[str]:
    if method is not None and method not in ON_LOADING:
        yield f"weights: what {method} makes of a checkpoint that is not quantised; counted as it is"


def _uncounted(model: Architecture) -> tuple[str, ...]:
    unknown = [f"weights: {part} (no safetensors file to measure it)" for part in model.other_parts]
    if not model.vocabulary:
        unknown.append("weights: embeddings, since config.json has no vocab_size")
    if not model.intermediate and (model.experts is None or len(model.experts.layers) < model.layers):
        unknown.append("weights: feed-forward layers, since config.json has no intermediate_size")
    others = model.count(LayerKind.STATE) + (model.count(LayerKind.LINEAR) if model.linear is None else 0)
    if others:
        unknown.append(f"weights: {others} layers without attention (no safetensors file to measure them)")
    if model.quantization is not None and checkpoint_bits(model.quantization) is None:
        method = checkpoint_method(model.quantization)
        unknown.append(f"weights: how many bits {method} leaves (no safetensors file to measure it); counted in full")
    return tuple(unknown)
