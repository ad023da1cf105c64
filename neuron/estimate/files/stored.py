"""The weights in a model's safetensors files, summed up by how they are placed in memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.files.fields import ModelFilesInvalid
from neuron.estimate.files.parameters import Part, WeightPlacement
from neuron.estimate.files.safetensors_header import FLOATS, Tensor, read_json, tensors_of

INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARDS = 10_000

_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head|wte|word_embeddings|embed_out|shared|output)\.weight$")
_ENCODERS = re.compile(
    r"(?:^|\.)(?:visual|vision_\w+|vit|audio_\w+|multi_modal_projector|mm_projector|mlp1|aligner|embed_vision)\."
)
_ROUTER = re.compile(r"\.(?:gate|router|shared_expert_gate)(?:\.wg)?\.(?:weight|bias|e_score_correction_bias)$")
_LATENT_DOWN = re.compile(r"\.(?:q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj_with_mqa)\.")
_KEYS_AND_VALUES = re.compile(r"\.[kv]_proj\.")
_ATTENTION = re.compile(r"(?:attn|attention)\w*\.")
_EXPERTS = re.compile(r"\.experts\.")
# Used only for speculative decoding, or recomputed.
_NOT_LOADED = re.compile(r"(?:^|\.)mtp\.|rotary_emb\.inv_freq$|(?:^|\.)attn\.bias$|attention\.masked_bias$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Weights that are treated alike."""

    part: Part
    placement: WeightPlacement
    matrices: bool  # quantization on loading applies to them


@dataclass(frozen=True)
class Amount:
    """`floats`: count of numbers in a plain floating-point type, which are converted on loading. `stored_bytes`: of all
    numbers, `float_bytes`: of the floats."""

    floats: int = 0
    float_bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True)
class StoredWeights:
    """The sums. `files` is the number of safetensors files."""

    amounts: Mapping[Group, Amount]
    files: int


def stored_weights(directory: Path, model: Architecture) -> StoredWeights | None:
    """The weights in the files of `directory`; None when there are no safetensors files. Blocks; reads headers only.

    Raises:
        ModelFilesInvalid: a file is broken, or one that the index names is missing.
    """
    paths = _files(directory)
    if not paths:
        return None
    sums: dict[Group, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in paths:
        for tensor in tensors_of(path):
            if not is_loaded(tensor, model):
                continue
            amount = sums[group_of(tensor)]
            if tensor.dtype in FLOATS:
                amount[0] += tensor.numbers
                amount[1] += tensor.stored_bytes
            amount[2] += tensor.stored_bytes
    amounts = {group: Amount(*amount) for group, amount in sums.items()}
    return StoredWeights(MappingProxyType(amounts), len(paths))


def is_loaded(tensor: Tensor, model: Architecture) -> bool:
    """False for layers beyond the model's own (for speculative decoding), and for an output head that is tied to the
    embeddings."""
    if _NOT_LOADED.search(tensor.name):
        return False
    if model.tied and tensor.name.endswith("lm_head.weight"):
        return False
    layer = _LAYER.search(tensor.name)
    return layer is None or _ENCODERS.search(tensor.name) is not None or int(layer[1][:9]) < model.layers


def group_of(tensor: Tensor) -> Group:
    """The group of a weight, by the naming conventions of transformers."""
    name = tensor.name
    if _ENCODERS.search(name):
        return Group(
            Part.ENCODERS, WeightPlacement.SPLIT if len(tensor.shape) > 1 else WeightPlacement.WHOLE, matrices=False
        )
    if _EMBEDDING.search(name):
        return Group(Part.EMBEDDING, WeightPlacement.SPLIT, matrices=False)
    if len(tensor.shape) < 2 or _ROUTER.search(name):
        return Group(Part.SMALL, WeightPlacement.WHOLE, matrices=False)
    placement = WeightPlacement.SPLIT
    if _LATENT_DOWN.search(name):
        placement = WeightPlacement.WHOLE
    elif _KEYS_AND_VALUES.search(name):
        placement = WeightPlacement.BY_KV_HEAD
    part = Part.ATTENTION if _ATTENTION.search(name) else Part.FEED_FORWARD
    return Group(Part.EXPERTS if _EXPERTS.search(name) else part, placement, matrices=True)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        return _shards(directory, index, read_json(index, max_bytes=_MAX_INDEX_BYTES))
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_"))
    # Mistral publishes the same weights twice, the second time in files of this name.
    return [path for path in found if not path.name.startswith("consolidated")] or found


def _shards(directory: Path, index: Path, content: Mapping[str, Any]) -> list[Path]:
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelFilesInvalid(f"{index} has no weight_map")
    shards: Iterable[Any] = names.values()
    unique = {name for name in shards if isinstance(name, str)}
    for name in unique:
        if Path(name).name != name:
            raise ModelFilesInvalid(f"{index}: {name[:120]!r} is not the name of a file beside it")
    if len(unique) > _MAX_SHARDS or any(not isinstance(name, str) for name in names.values()):
        raise ModelFilesInvalid(f"{index}: weight_map does not list the weights' files")
    missing = sorted(name for name in unique if not (directory / name).exists())
    if missing:
        raise ModelFilesInvalid(f"{directory / missing[0]} is missing ({len(missing)} of {len(unique)} files are)")
    return [directory / name for name in sorted(unique)]
