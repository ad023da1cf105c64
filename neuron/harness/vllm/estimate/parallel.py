"""How many devices a model can be split over, by the rules of vLLM 0.32's layers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.number_types import checkpoint_method

_VOCABULARY_PADDING = 64


def obstacle(model: Architecture, devices: int) -> str | None:
    """Why the model cannot be split over `devices`; None when it can."""
    return None if devices == 1 else next(_obstacles(model, devices), None)


def _obstacles(model: Architecture, devices: int) -> Iterator[str]:
    if model.heads % devices:
        yield f"{model.heads} attention heads cannot be divided by {devices}"
    heads = model.kv_heads
    if model.latent is None and heads and heads % devices and devices % heads:
        yield f"{heads} key-value heads can neither be divided by {devices} nor repeated to be {devices}"
    if model.linear is not None:
        for what, count in (("key", model.linear.key_heads), ("value", model.linear.value_heads)):
            if count % devices:
                yield f"{count} {what} heads of the linear attention cannot be divided by {devices}"
    padded = -(-model.vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    if padded % devices:
        yield f"the vocabulary, {padded} with its padding, cannot be divided by {devices}"
    for what, width in _widths(model):
        if width % devices:
            yield f"the {what}'s width {width} cannot be divided by {devices}"
        block = _block(model)
        if block and width // devices % block:
            yield f"the {what}'s width {width} on {devices} devices is not a multiple of the quantization's {block}"


def _widths(model: Architecture) -> Iterator[tuple[str, int]]:
    experts = model.experts
    if experts is None or len(experts.layers) < model.layers:
        yield "feed-forward layer", model.intermediate
    if experts is not None:
        yield "expert", experts.width
        if experts.shared_width:
            yield "shared expert", experts.shared_width


def _block(model: Architecture) -> int | None:
    """Block size of a quantized checkpoint: its matrices can be split only between blocks."""
    quantization = model.quantization
    if quantization is None:
        return None
    if checkpoint_method(quantization) in ("awq", "auto_awq", "gptq", "auto_gptq", "gptq_marlin", "awq_marlin"):
        sizes = [quantization.get("group_size")]
    else:
        blocks = quantization.get("weight_block_size")  # 8-bit floats, as DeepSeek and Qwen publish them
        sizes = blocks if isinstance(blocks, list) else []
    return max((size for size in sizes if isinstance(size, int) and size > 0), default=None)
