"""What each layer of a model keeps between tokens. Pure."""

from __future__ import annotations

from enum import Enum

from neuron.estimate.files.fields import Fields, ModelFilesInvalid

MAX_LAYERS = 4096


class LayerKind(Enum):
    """What a layer keeps of a sequence."""

    FULL = "full attention"  # keys and values of every token
    SLIDING = "sliding attention"  # of the tokens in its window
    CHUNKED = "chunked attention"  # of the tokens of one chunk
    LINEAR = "linear attention"  # a state of one size (gated delta net)
    STATE = "state space"  # a state of unknown size (Mamba, short convolution)
    NOTHING = "no attention"


_NAMES = {
    "full_attention": LayerKind.FULL,
    "attention": LayerKind.FULL,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.CHUNKED,
    "linear_attention": LayerKind.LINEAR,
}
_HYBRID_LETTERS = {"*": LayerKind.FULL, "M": LayerKind.STATE}  # Nemotron-H; others are feed-forward layers
_ALTERNATING = frozenset({"gemma2"})  # every other layer is sliding, starting with the first
_DEFAULT_PATTERN = {"gemma3": 6, "gemma3_text": 6, "cohere2": 4}  # every n-th layer is full


def layer_kinds(fields: Fields, layers: int) -> tuple[LayerKind, ...]:
    """The kind of each layer, from `layer_types` or from older fields with the same meaning.

    Raises:
        ModelFilesInvalid: there are too many layers, or `layer_types` does not cover them all.
    """
    if layers > MAX_LAYERS:
        raise fields.invalid("num_hidden_layers", f"is more than {MAX_LAYERS}")
    types = fields.listed("layer_types")
    if types is not None:
        if len(types) < layers:
            raise ModelFilesInvalid(f"{fields.file}: layer_types has {len(types)} entries for {layers} layers")
        return tuple(_NAMES.get(str(name), LayerKind.STATE) for name in types[:layers])
    pattern = fields.text("hybrid_override_pattern")
    if pattern is not None:
        if len(pattern) < layers:
            raise ModelFilesInvalid(f"{fields.file}: hybrid_override_pattern is shorter than {layers} layers")
        return tuple(_HYBRID_LETTERS.get(letter, LayerKind.NOTHING) for letter in pattern[:layers])
    return (
        tuple(_kind_of(fields, number) for number in range(layers)) if _varies(fields) else _all_alike(fields, layers)
    )


def window_of(fields: Fields) -> int | None:
    """Tokens of the sliding window; None when the model has none. 0 and `use_sliding_window` false mean none."""
    if fields.flag("use_sliding_window") is False:
        return None
    return fields.integer("sliding_window") or None


def _all_alike(fields: Fields, layers: int) -> tuple[LayerKind, ...]:
    return (LayerKind.SLIDING if window_of(fields) else LayerKind.FULL,) * layers


def _varies(fields: Fields) -> bool:
    return bool(_period(fields)) or fields.text("model_type") in _ALTERNATING or _first_sliding(fields) is not None


def _period(fields: Fields) -> int | None:
    """One of this many layers has full attention."""
    given = fields.integer("full_attention_interval", "attn_layer_period")
    if given:
        return given
    if fields.integer("attention_chunk_size"):
        return fields.integer("no_rope_layer_interval") or 4
    if window_of(fields) is None:
        return None
    return fields.integer("sliding_window_pattern", "_sliding_window_pattern") or _DEFAULT_PATTERN.get(
        fields.text("model_type") or ""
    )


def _first_sliding(fields: Fields) -> int | None:
    """In Qwen2, layers from `max_window_layers` on are sliding."""
    return fields.integer("max_window_layers") if window_of(fields) is not None else None


def _kind_of(fields: Fields, number: int) -> LayerKind:
    window = window_of(fields)
    if fields.text("model_type") in _ALTERNATING and window:
        return LayerKind.SLIDING if number % 2 == 0 else LayerKind.FULL
    period = _period(fields)
    if period is None:
        first = _first_sliding(fields)
        return LayerKind.SLIDING if first is not None and number >= first else LayerKind.FULL
    if fields.integer("attn_layer_period"):  # Jamba
        return LayerKind.FULL if number % period == (fields.integer("attn_layer_offset") or 0) else LayerKind.STATE
    if (number + 1) % period == 0:
        return LayerKind.FULL
    if fields.integer("full_attention_interval"):
        return LayerKind.LINEAR
    return LayerKind.CHUNKED if fields.integer("attention_chunk_size") else LayerKind.SLIDING
