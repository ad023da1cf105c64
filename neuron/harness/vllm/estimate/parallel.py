"""How many devices a model can be split over, by the rules of vLLM 0.32's layers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.number_types import checkpoint_method
from shared.protocol import Parallelism

_VOCABULARY_PADDING = 64


def obstacle(model: Architecture, split: Parallelism) -> str | None:
    """Why the model cannot be split in this way; None when it can."""
    return next(_obstacles(model, split), None)


def _obstacles(model: Architecture, split: Parallelism) -> Iterator[str]:
    if split.pipeline > model.layers:
        yield f"{model.layers} layers are too few for {split.pipeline} pipeline stages"
    if split.expert and model.experts is None:
        yield "expert parallelism needs a mixture of experts"
    if split.tensor > 1:
        yield from _tensor_obstacles(model, split.tensor)
    for what, width, devices in _widths(model, split):
        if devices > 1:
            yield from _width_obstacles(model, what, width, devices)


def _tensor_obstacles(model: Architecture, devices: int) -> Iterator[str]:
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


def _width_obstacles(model: Architecture, what: str, width: int, devices: int) -> Iterator[str]:
    if width % devices:
        yield f"the {what}'s width {width} cannot be divided by {devices}"
    block = _block(model)
    if block and width // devices % block:
        yield f"the {what}'s width {width} on {devices} devices is not a multiple of the quantization's {block}"


def _widths(model: Architecture, split: Parallelism) -> Iterator[tuple[str, int, int]]:
    """Each width, and the number of devices that divide it. Without expert parallelism the experts are divided by the
    devices of all copies."""
    experts = model.experts
    if experts is None or len(experts.layers) < model.layers:
        yield "feed-forward layer", model.intermediate, split.tensor
    if experts is not None:
        yield "expert", experts.width, 1 if split.expert else split.tensor * split.data
        if experts.shared_width:
            yield "shared expert", experts.shared_width, split.tensor


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
