"""Memory of the KV cache, by the rules of vLLM 0.32 (`kv_cache_interface.py`). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from neuron.estimate.files.architecture import Architecture, LinearAttention
from neuron.estimate.files.layers import LayerKind
from neuron.estimate.files.number_types import KV_BITS, SCALED_PER_HEAD

BLOCK_TOKENS = 16  # vLLM allocates a sequence's memory in blocks of this many tokens (`--block-size`)
_BATCHES_IN_FLIGHT = 2  # asynchronous scheduling: the next batch is scheduled while one runs
_STATES_EACH = 2  # prefix caching keeps a second copy of a sequence's state
_CACHING = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED, LayerKind.LINEAR)
_SPARSE_MLA_BYTES = 656  # `fp8_ds_mla`: 512 8-bit numbers, 4 scales, and 64 16-bit numbers of the rotary part


@dataclass(frozen=True)
class Sequences:
    """What has to fit: `count` sequences of `tokens` each, with `batched_tokens` per step."""

    count: int
    tokens: int
    batched_tokens: int


@dataclass(frozen=True)
class Cached:
    """The cache of one kind of layers: bytes on each device, and how they are computed."""

    kind: LayerKind
    size: float
    how: str


def cached_of(
    model: Architecture, wanted: Sequences, *, dtype: str, model_bits: int, devices: int
) -> tuple[Cached, ...]:
    """The cache on each of `devices`, for each kind of layer with a known cache size."""
    return () if model.encoder_only else tuple(_cached(model, wanted, dtype, model_bits, devices))


def token_bytes(model: Architecture, *, dtype: str = "auto", model_bits: int = 16, devices: int = 1) -> float:
    """Bytes per token in one attention layer of one device.

    Key-value heads are split over the devices, and repeated if there are more devices than heads. The latent of MLA is
    shared by all heads, so each device has all of it.
    """
    bits = KV_BITS.get(dtype, float(model_bits))
    if model.latent is not None:
        return _SPARSE_MLA_BYTES if dtype == "fp8_ds_mla" else model.latent.cached_width * bits / 8
    heads = heads_on_device(model.kv_heads, devices)
    scales = 2 * 4 * heads if dtype in SCALED_PER_HEAD else 0
    return 2 * heads * model.head_dim * bits / 8 + scales


def heads_on_device(kv_heads: int, devices: int) -> int:
    return max(1, -(-kv_heads // devices)) if kv_heads else 0


def unknown_of(model: Architecture, dtype: str) -> tuple[str, ...]:
    """What the estimate leaves out, one sentence each."""
    unknown = []
    if dtype not in ("auto", *KV_BITS):
        unknown.append(f"KV cache: how much a number of type {dtype} takes; counted in the model's own type")
    if model.count(LayerKind.STATE):
        unknown.append(f"state of {model.count(LayerKind.STATE)} state-space layers (Mamba or alike)")
    if LayerKind.LINEAR in model.kinds and model.linear is None:
        unknown.append(f"state of {model.count(LayerKind.LINEAR)} linear-attention layers: unknown size")
    if model.text.flag("is_encoder_decoder"):
        unknown.append("KV cache of the cross-attention to the encoder's output")
    if model.text.integer("index_topk"):
        unknown.append("keys of the sparse attention's indexer")
    if not model.encoder_only and not model.heads and not model.latent:
        unknown.append("KV cache: config.json has no number of attention heads")
    return tuple(unknown)


def _cached(model: Architecture, wanted: Sequences, dtype: str, bits: int, devices: int) -> Iterator[Cached]:
    each = token_bytes(model, dtype=dtype, model_bits=bits, devices=devices)
    for kind in (LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED):
        layers = model.count(kind)
        if not layers or not each:
            continue
        tokens, blocks, bounded = _kept(model, kind, wanted)
        grouped = grouped_layers(model, kind)
        size = wanted.count * blocks * BLOCK_TOKENS * each * grouped
        padded = "" if grouped == layers else f" (in groups: {grouped})"
        how = f"{wanted.count} x {tokens:,} tokens{bounded}, {layers} layers{padded}, {_plain(each)} bytes each"
        yield Cached(kind, size, how)
    if model.linear is not None:
        layers = grouped_layers(model, LayerKind.LINEAR)
        state = _state_bytes(model.linear, bits, devices)
        size = wanted.count * _STATES_EACH * state * layers
        how = f"{wanted.count} x {_STATES_EACH} states of {_plain(state)} bytes, {layers} layers"
        yield Cached(LayerKind.LINEAR, size, how)


def grouped_layers(model: Architecture, kind: LayerKind) -> int:
    """Layers of a kind that memory is allocated for.

    All kinds draw blocks of one size from one pool, so vLLM forms groups of equal size from the layers of each kind and
    pads the last group. The size is the number of layers of the rarest kind, or of the most frequent one if that is not
    much larger.
    """
    counts = [count for each in _CACHING if (count := model.count(each))]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return -(-model.count(kind) // size) * size


def _kept(model: Architecture, kind: LayerKind, wanted: Sequences) -> tuple[int, int, str]:
    """Tokens and blocks of one sequence in a layer, and what limits them."""
    in_flight = _BATCHES_IN_FLIGHT * wanted.batched_tokens
    if kind is LayerKind.SLIDING and model.window:
        tokens = min(model.window - 1 + in_flight, wanted.tokens)
        # A window may start inside a block: one more block.
        return tokens, -(-tokens // BLOCK_TOKENS) + 1, f" (window {model.window}, and {in_flight} being computed)"
    if kind is LayerKind.CHUNKED and model.chunk:
        tokens = min(model.chunk + in_flight, wanted.tokens)
        return tokens, -(-tokens // BLOCK_TOKENS), f" (chunk {model.chunk}, and {in_flight} being computed)"
    return wanted.tokens, -(-wanted.tokens // BLOCK_TOKENS), ""


def _state_bytes(linear: LinearAttention, bits: int, devices: int) -> float:
    convolution = linear.convolved / devices * (linear.kernel - 1) * bits / 8
    return convolution + linear.value_heads / devices * linear.value_dim * linear.key_dim * linear.state_bytes


def _plain(size: float) -> str:
    return f"{size:,.0f}" if float(size).is_integer() else f"{size:,.1f}"
