"""The mixture of experts that a config.json describes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from neuron.estimate.files.fields import Fields


@dataclass(frozen=True)
class Experts:
    """The mixture of experts. `width` is of one expert, `shared_width` of all shared experts together (0: none)."""

    count: int
    chosen: int  # for each token
    width: int
    shared_width: int
    layers: frozenset[int]


def experts_of(text: Fields, layers: int) -> Experts | None:
    """The experts that a configuration describes; None when it has none.

    Raises:
        ModelFilesInvalid: their width is missing, or a field has a wrong value.
    """
    count = text.integer("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    if not count:
        return None
    width = text.integer("moe_intermediate_size") or text.required("intermediate_size", "ffn_hidden_size")
    shared = text.integer("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    if shared is None:
        shared = (text.integer("n_shared_experts", "num_shared_experts") or 0) * width
    if text.text("model_type") == "llama4_text":
        shared = width
    return Experts(
        count=count,
        chosen=text.integer("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts") or 1,
        width=width,
        shared_width=shared,
        layers=_expert_layers(text, layers),
    )


def _expert_layers(text: Fields, layers: int) -> frozenset[int]:
    first_dense = text.integer("first_k_dense_replace") or 0
    step = text.integer("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step") or 1
    # DeepSeek counts steps from layer 0; in other models the last layer of each step has experts.
    offset = 0 if text.integer("moe_layer_freq") else 1
    dense = {number for number in text.listed("mlp_only_layers") or [] if isinstance(number, int)}
    return frozenset(
        number
        for number in range(layers)
        if number >= first_dense and number not in dense and (number + offset) % step == 0
    )
