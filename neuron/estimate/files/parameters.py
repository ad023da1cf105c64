"""How many parameters a model has, from its configuration alone. Pure.

Used for models without safetensors files; the tests compare it with the published sizes of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.experts import Experts
from neuron.estimate.files.layers import LayerKind

_LEARNED_POSITIONS = frozenset({"gpt2", "gpt_bigcode", "opt"})


class WeightPlacement(Enum):
    """How tensor parallelism places a weight."""

    SPLIT = "split"  # each device has its share
    BY_KV_HEAD = "by kv head"  # split, but never finer than one key-value head
    WHOLE = "whole"  # on every device


class Part(Enum):
    """What a weight belongs to; the value is its display name."""

    EMBEDDING = "embeddings and output head"
    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"
    EXPERTS = "experts"
    SMALL = "norms, biases, routers"
    ENCODERS = "image and audio encoders"


@dataclass(frozen=True)
class Count:
    """Parameters of one part that are treated alike. `matrices`: quantization applies to them."""

    part: Part
    parameters: int
    placement: WeightPlacement
    matrices: bool


def counts_of(model: Architecture) -> tuple[Count, ...]:
    """The parameters of the text model, without image and audio encoders."""
    return tuple(count for count in _counts(model) if count.parameters)


def parameter_count(model: Architecture) -> int:
    """All of `counts_of` together."""
    return sum(count.parameters for count in counts_of(model))


def _counts(model: Architecture) -> Iterator[Count]:
    hidden = model.hidden
    heads = 1 if model.tied or model.encoder_only else 2
    positions = 0
    if model.encoder_only or model.model_type in _LEARNED_POSITIONS:
        positions = (model.text.integer("max_position_embeddings", "n_positions") or 0) + (
            model.text.integer("type_vocab_size") or 0
        )
    yield Count(Part.EMBEDDING, (heads * model.vocabulary + positions) * hidden, WeightPlacement.SPLIT, matrices=False)
    attending = sum(kind not in (LayerKind.LINEAR, LayerKind.STATE, LayerKind.NOTHING) for kind in model.kinds)
    if model.latent is not None:
        yield from _latent_attention(model, attending)
    else:
        yield from _attention(model, attending)
    yield from _linear_attention(model)
    yield from _feed_forward(model)
    norms = model.layers * model.norms * hidden + hidden
    if model.encoder_only:  # a norm of the embeddings in place of the last one, each with a bias; and a pooler
        norms = 2 * norms + hidden * hidden + hidden
    yield Count(Part.SMALL, norms, WeightPlacement.WHOLE, matrices=False)


def _attention(model: Architecture, layers: int) -> Iterator[Count]:
    hidden, queries, keys = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    split = hidden * queries * (2 if model.query_gate else 1) + queries * hidden
    yield Count(Part.ATTENTION, layers * split, WeightPlacement.SPLIT, matrices=True)
    yield Count(Part.ATTENTION, layers * 2 * hidden * keys, WeightPlacement.BY_KV_HEAD, matrices=True)
    biased = model.encoder_only or model.qkv_biases
    small = (queries + 2 * keys) * biased + hidden * (model.encoder_only or model.output_bias)
    small += 2 * model.head_dim * model.qk_norms + model.heads * (model.model_type == "gpt_oss")  # its sinks
    yield Count(Part.SMALL, layers * small, WeightPlacement.WHOLE, matrices=False)


def _latent_attention(model: Architecture, layers: int) -> Iterator[Count]:
    latent = model.latent
    assert latent is not None
    query_dim = latent.nope_dim + latent.rope_dim
    down = model.hidden * latent.cached_width
    if latent.q_rank is None:
        split = model.hidden * model.heads * query_dim
    else:
        down += model.hidden * latent.q_rank
        split = latent.q_rank * model.heads * query_dim
    split += latent.kv_rank * model.heads * (latent.nope_dim + latent.value_dim)
    split += model.heads * latent.value_dim * model.hidden
    yield Count(Part.ATTENTION, layers * split, WeightPlacement.SPLIT, matrices=True)
    yield Count(Part.ATTENTION, layers * down, WeightPlacement.WHOLE, matrices=True)
    yield Count(Part.SMALL, layers * (latent.kv_rank + (latent.q_rank or 0)), WeightPlacement.WHOLE, matrices=False)


def _linear_attention(model: Architecture) -> Iterator[Count]:
    linear, layers = model.linear, model.count(LayerKind.LINEAR)
    if linear is None:
        return
    values = linear.value_heads * linear.value_dim
    # Queries, keys, values and the output's gate; two numbers per head; the output projection.
    split = model.hidden * (linear.convolved + values + 2 * linear.value_heads) + values * model.hidden
    yield Count(Part.ATTENTION, layers * split, WeightPlacement.SPLIT, matrices=True)
    small = linear.convolved * linear.kernel + 2 * linear.value_heads + linear.value_dim
    yield Count(Part.SMALL, layers * small, WeightPlacement.SPLIT, matrices=False)


def _feed_forward(model: Architecture) -> Iterator[Count]:
    matrices = 3 if model.gated else 2
    experts = model.experts
    dense = model.layers - (0 if experts is None else len(experts.layers))
    yield Count(
        Part.FEED_FORWARD, dense * matrices * model.hidden * model.intermediate, WeightPlacement.SPLIT, matrices=True
    )
    if not model.gated:
        yield Count(Part.SMALL, dense * (model.intermediate + model.hidden), WeightPlacement.WHOLE, matrices=False)
    if experts is not None:
        yield from _experts(model, experts)


def _experts(model: Architecture, experts: Experts) -> Iterator[Count]:
    layers, hidden = len(experts.layers), model.hidden
    each = experts.count * 3 * hidden * experts.width
    yield Count(Part.EXPERTS, layers * each, WeightPlacement.SPLIT, matrices=True)
    shared = 3 * hidden * experts.shared_width
    yield Count(Part.FEED_FORWARD, layers * shared, WeightPlacement.SPLIT, matrices=True)
    router = hidden * experts.count
    if model.model_type == "gpt_oss":  # biases of the router and of every expert
        router += experts.count + experts.count * (2 * experts.width + hidden)
    yield Count(Part.SMALL, layers * router, WeightPlacement.WHOLE, matrices=False)
