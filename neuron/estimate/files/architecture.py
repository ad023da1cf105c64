"""What a config.json says about a model, as far as memory depends on it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuron.estimate.files.experts import Experts, experts_of
from neuron.estimate.files.fields import Fields
from neuron.estimate.files.layers import LayerKind, layer_kinds, window_of

_ENCODERS = frozenset(
    {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "distilbert", "new", "mpnet", "electra", "gte"}
)
# Their feed-forward layers have two matrices; all others have three (gate, up, down).
_UNGATED = _ENCODERS - {"modernbert", "nomic_bert", "new", "gte"} | {
    *("gpt2", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "phi", "starcoder2", "nemotron", "mpt", "whisper"),
}
# They have biases of q, k and v that no field mentions.
_BIASED_KEYS = frozenset({"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"})
_QK_NORMS = frozenset({"qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl_text", "gemma3", "gemma3_text"})
_GATED_OUTPUT = ("qwen3_next", "qwen3_5")
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})  # of each layer
_TIED_BY_DEFAULT = frozenset(
    {
        *("gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"),
        *("gpt2", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "starcoder2", "whisper"),
    }
)
# Defaults of transformers for fields that these models' published files omit.
_DEFAULTS = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
}
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")
_ENCODER_PARTS = ("vision_config", "audio_config", "vit_config", "vision_encoder", "speech_config")


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention (MLA)."""

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    @property
    def cached_width(self) -> int:
        """Numbers cached for each token and layer, independent of the number of heads."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class LinearAttention:
    """The gated delta net of Qwen3-Next and its successors."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    state_bytes: int  # of each number of the state

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Architecture:
    """One model. Widths are in numbers, not bytes; 0: the configuration does not say."""

    name: str
    model_type: str
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    window: int | None = None
    chunk: int | None = None
    latent: LatentAttention | None = None
    experts: Experts | None = None
    linear: LinearAttention | None = None
    tied: bool = False
    gated: bool = True
    qkv_biases: bool = False
    output_bias: bool = False
    query_gate: bool = False  # the query projection is twice as wide, for the output's gate
    qk_norms: bool = False
    norms: int = 2  # of each layer
    encoder_only: bool = False
    other_parts: tuple[str, ...] = ()  # config sections of image or audio encoders
    dtype: str | None = None  # of the weights as published
    quantization: Mapping[str, Any] | None = None
    text: Fields = field(default_factory=lambda: Fields({}, "config.json"), compare=False)

    @property
    def layers(self) -> int:
        return len(self.kinds)

    def count(self, kind: LayerKind) -> int:
        """Layers of this kind."""
        return sum(each is kind for each in self.kinds)


def architecture_of(config: Fields) -> Architecture:
    """The model that `config` describes; for a multimodal one, the part that generates text.

    Raises:
        ModelFilesInvalid: a field has a wrong value, or the number or width of the layers is missing.
    """
    text = _text_of(config)
    model_type = text.text("model_type") or config.text("model_type") or ""
    hidden = text.required("hidden_size", "n_embd", "d_model")
    layers = text.required("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    heads = text.integer("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads") or 0
    kinds = layer_kinds(text, layers)
    intermediate = text.integer(
        "intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim"
    )
    tied = text.flag("tie_word_embeddings")
    if tied is None:
        tied = config.flag("tie_word_embeddings")
    attention_bias = bool(text.flag("attention_bias"))
    return Architecture(
        name=_name(config),
        model_type=model_type,
        hidden=hidden,
        intermediate=4 * hidden if intermediate is None and model_type in _UNGATED else intermediate or 0,
        vocabulary=text.integer("vocab_size") or config.integer("vocab_size") or 0,
        heads=heads,
        kv_heads=_kv_heads(text) or heads,
        head_dim=text.integer("head_dim", "hidden_size_per_head") or (hidden // heads if heads else 0),
        kinds=kinds,
        window=window_of(text),
        chunk=text.integer("attention_chunk_size"),
        latent=_latent(text),
        experts=experts_of(text, layers),
        linear=_linear(text) if LayerKind.LINEAR in kinds else None,
        tied=model_type in _TIED_BY_DEFAULT if tied is None else tied,
        gated=model_type not in _UNGATED,
        qkv_biases=attention_bias or model_type in _BIASED_KEYS,
        output_bias=attention_bias,
        query_gate=bool(text.flag("attn_output_gate")) or model_type.startswith(_GATED_OUTPUT),
        qk_norms=model_type in _QK_NORMS,
        norms=4 if model_type in _FOUR_NORMS else 2,
        encoder_only=model_type in _ENCODERS or text.flag("is_causal") is False,
        other_parts=tuple(name for name in _ENCODER_PARTS if config.inner(name) is not None),
        dtype=_dtype(config, text),
        quantization=_quantization(config, text),
        text=text,
    )


def _text_of(config: Fields) -> Fields:
    inner = config.inner(*_TEXT)
    if inner is not None:
        return _text_of(inner)  # Qwen-Omni nests twice
    defaults = _DEFAULTS.get(config.text("model_type") or "", {})
    given = {name: value for name, value in config.values.items() if value is not None}
    return Fields({**defaults, **given}, config.file)


def _kv_heads(text: Fields) -> int | None:
    if text.flag("multi_query") and not text.flag("new_decoder_architecture"):  # the first Falcons
        return 1
    return text.integer("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")


def _name(config: Fields) -> str:
    names = config.listed("architectures") or []
    return str(names[0]) if names else ""


def _dtype(config: Fields, text: Fields) -> str | None:
    given = text.text("dtype", "torch_dtype") or config.text("dtype", "torch_dtype")
    return None if given is None else given.removeprefix("torch.")


def _quantization(config: Fields, text: Fields) -> Mapping[str, Any] | None:
    for fields in (config, text):
        inner = fields.inner("quantization_config", "compression_config")
        if inner is not None:
            return inner.values
    return None


def _latent(text: Fields) -> LatentAttention | None:
    rank = text.integer("kv_lora_rank")
    if not rank:
        return None
    return LatentAttention(
        q_rank=text.integer("q_lora_rank") or None,
        kv_rank=rank,
        rope_dim=text.required("qk_rope_head_dim"),
        nope_dim=text.required("qk_nope_head_dim"),
        value_dim=text.required("v_head_dim"),
    )


def _linear(text: Fields) -> LinearAttention | None:
    if text.integer("linear_num_value_heads") is None:
        return None
    return LinearAttention(
        key_heads=text.required("linear_num_key_heads"),
        value_heads=text.required("linear_num_value_heads"),
        key_dim=text.required("linear_key_head_dim"),
        value_dim=text.required("linear_value_head_dim"),
        kernel=text.required("linear_conv_kernel_dim"),
        state_bytes=2 if text.text("mamba_ssm_dtype") in ("bfloat16", "float16") else 4,
    )
