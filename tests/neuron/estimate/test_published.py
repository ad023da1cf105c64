"""The arithmetic compared with published sizes of well-known models, and with logs of the real vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neuron.estimate.files.layers import LayerKind
from neuron.estimate.files.number_types import kv_cache_name
from neuron.estimate.files.parameters import parameter_count
from neuron.estimate.options import EngineOptions, human_number
from neuron.estimate.weights import ModelFiles, weights_of
from neuron.harness.vllm.estimate.context_length import default_length, longest
from neuron.harness.vllm.estimate.estimator import estimate
from neuron.harness.vllm.estimate.kv_cache import Sequences, cached_of, grouped_layers, token_bytes
from neuron.harness.vllm.estimate.parallel import obstacle
from shared.protocol import Device, Parallelism
from tests.neuron.estimate import published
from tests.neuron.estimate.published import MODELS, Published

MIB = 1 << 20
LOGS = (
    Path(__file__).parents[1] / "harness" / "vllm_logs"
)  # vLLM 0.32 with the model of tests/environment/tiny_model.py


def by_name(model: Published) -> str:
    return model.name


def gigabytes(model: Published, *, quantization: str | None = None) -> float:
    """Size of the weights in 10**9 bytes, as publishers count."""
    groups = weights_of(model.architecture, None, dtype="auto", quantization=quantization).groups
    return sum(group.size for group in groups) / 1e9


def cache_mib(model: Published, tokens: int, *, devices: int = 1, dtype: str = "auto", batched: int = 2048) -> float:
    wanted = Sequences(count=1, tokens=tokens, batched_tokens=batched)
    cached = cached_of(model.architecture, wanted, dtype=dtype, model_bits=16, devices=devices)
    return sum(each.size for each in cached) / MIB


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_parameter_counts_match_published_ones(model: Published) -> None:
    """Dense, tied, mixtures of experts, MLA, hybrids, encoders: from config.json alone, within half a percent."""
    assert parameter_count(model.architecture) / 1e9 == pytest.approx(model.billions, rel=0.005)


@pytest.mark.parametrize("model", MODELS, ids=by_name)
def test_token_sizes_match_published_ones(model: Published) -> None:
    """The size is exact: all layers that cache tokens, 16 bits a number."""
    architecture = model.architecture
    layers = sum(architecture.count(kind) for kind in (LayerKind.FULL, LayerKind.SLIDING))
    each = 0 if architecture.encoder_only else token_bytes(architecture)
    assert layers * each == model.token_bytes


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (published.LLAMA_8B, 16.06),  # the size of the repository's safetensors files
        (published.LLAMA_70B, 141.1),
        (published.QWEN3_8B, 16.38),
        (published.QWEN2_5_05B, 0.988),
        (published.MIXTRAL, 93.4),
        (published.DEEPSEEK_V3, 674),  # 8 bits except embeddings, norms and head; 14 more for speculative decoding
        (published.GPT_OSS_20B, 13.76),  # the experts in 4.25 bits, the rest in 16
    ],
    ids=lambda value: value.name if isinstance(value, Published) else "",
)
def test_weights_match_published_sizes(model: Published, expected: float) -> None:
    """The estimate matches the sizes of the files in their published types."""
    assert gigabytes(model) == pytest.approx(expected, rel=0.005)


def test_fp8_on_loading_halves_the_matrices_only() -> None:
    """Embeddings and output head (2.1 GB of Llama 8B) and norms stay in 16 bits. vLLM logs 8.49 GiB."""
    assert gigabytes(published.LLAMA_8B, quantization="fp8") == pytest.approx(9.08, rel=0.005)
    assert gigabytes(published.LLAMA_8B, quantization="awq") == gigabytes(published.LLAMA_8B)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (published.LLAMA_8B, 131_072),
        (published.QWEN3_8B, 40_960),
        (published.MISTRAL_7B, 32_768),
        (published.DEEPSEEK_V3, 163_840),  # includes YaRN's factor of 40
        (
            published.GEMMA3_27B,
            131_072,
        ),  # the class's default, since the published file omits it; its linear scaling is included
        (published.GPT_OSS_20B, 131_072),
    ],
    ids=lambda value: value.name if isinstance(value, Published) else "",
)
def test_longest_sequence_matches_vllm(model: Published, tokens: int) -> None:
    """Scaling of the rotary embedding is counted once."""
    assert longest(model.architecture.text) == tokens == default_length(model.architecture.text)


def test_cache_of_full_attention_grows_with_the_sequence() -> None:
    """Llama 8B: 128 KiB per token, 16 GiB for the whole context; half with 8 bits, full blocks of 16 tokens."""
    assert cache_mib(published.LLAMA_8B, 131_072) == 16_384
    assert cache_mib(published.LLAMA_8B, 131_072, dtype="fp8") == 8_192
    assert cache_mib(published.LLAMA_8B, 17) == cache_mib(published.LLAMA_8B, 32) == 4


def test_heads_are_repeated_on_more_devices() -> None:
    """Qwen3-30B-A3B has 4 key-value heads: each of 8 devices holds one. Every device holds all of MLA's latent."""
    moe, latent = published.QWEN3_30B_A3B, published.DEEPSEEK_V3
    assert [token_bytes(moe.architecture, devices=devices) for devices in (1, 2, 4, 8)] == [2048, 1024, 512, 512]
    assert {token_bytes(latent.architecture, devices=devices) for devices in (1, 8, 16)} == {1152}


def test_sliding_layers_keep_only_their_window() -> None:
    """Gemma 3: 10 layers keep all tokens, 52 the window of 1024 and the running batches, in groups of 10."""
    architecture = published.GEMMA3_27B.architecture
    assert (architecture.count(LayerKind.FULL), architecture.count(LayerKind.SLIDING)) == (10, 52)
    each = token_bytes(architecture)
    window = (-(-(1023 + 2 * 2048) // 16) + 1) * 16
    expected = (10 * 131_072 + 60 * window) * each / MIB
    assert cache_mib(published.GEMMA3_27B, 131_072) == pytest.approx(expected)
    assert cache_mib(published.GEMMA3_27B, 131_072) < 0.25 * 131_072 * published.GEMMA3_27B.token_bytes / MIB


@pytest.mark.parametrize(
    ("model", "tokens", "mib"),
    [
        (published.GEMMA3_27B, 131_072, 12_647.5),
        (published.GPT_OSS_20B, 131_072, 3171.375),
        (published.QWEN3_8B, 40_960, 5760),
    ],
    ids=lambda value: value.name if isinstance(value, Published) else "",
)
def test_cache_matches_vllms_own_functions(model: Published, tokens: int, mib: float) -> None:
    """`_max_memory_usage_bytes_from_groups` of vLLM 0.32, called with these models' layers: to the byte."""
    assert cache_mib(model, tokens) == mib


@pytest.mark.parametrize(
    ("full", "sliding", "grouped"), [(12, 12, (12, 12)), (10, 52, (10, 60)), (10, 14, (14, 14)), (8, 0, (8, 0))]
)
def test_layers_of_several_kinds_share_blocks(full: int, sliding: int, grouped: tuple[int, int]) -> None:
    """A group has the size of the rarest kind, or of the most frequent one if that is not much larger."""
    types = ["full_attention"] * full + ["sliding_attention"] * sliding
    config = {**published.LLAMA_8B.config, "num_hidden_layers": len(types), "layer_types": types, "sliding_window": 128}
    model = Published("mixed", config, 0, 0).architecture
    assert (grouped_layers(model, LayerKind.FULL), grouped_layers(model, LayerKind.SLIDING)) == grouped


def test_chunked_layers_keep_a_chunk() -> None:
    """Llama 4: every fourth layer keeps all tokens, the others 8192 and the running batches."""
    config = {**published.LLAMA_8B.config, "attention_chunk_size": 8192, "no_rope_layer_interval": 4}
    model = Published("chunked", config, 0, 0)
    assert (model.architecture.count(LayerKind.FULL), model.architecture.count(LayerKind.CHUNKED)) == (8, 24)
    assert cache_mib(model, 131_072) == (8 * 131_072 + 24 * (8192 + 4096)) * 4096 / MIB


def test_linear_attention_has_a_state_of_fixed_size() -> None:
    """Qwen3-Next: 12 of 48 layers keep tokens; the others have 2 MiB of state each, for any length."""
    short, long = cache_mib(published.QWEN3_NEXT, 16), cache_mib(published.QWEN3_NEXT, 16 + (1 << 18))
    assert long - short == pytest.approx((1 << 18) * published.QWEN3_NEXT.token_bytes / MIB)
    state = 32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2
    assert short == pytest.approx((2 * 36 * state + 16 * published.QWEN3_NEXT.token_bytes) / MIB)


def test_a_checkpoint_may_define_an_8_bit_cache() -> None:
    """compressed-tensors and ModelOpt checkpoints may define it; vLLM's flag takes precedence."""
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert kv_cache_name("auto", scheme) == "fp8"
    assert kv_cache_name("auto", {"quantization": {"kv_cache_quant_algo": "FP8"}}) == "fp8"
    assert kv_cache_name("bfloat16", scheme) == "bfloat16"
    assert kv_cache_name("auto", {}) == kv_cache_name("auto", None) == "auto"


@pytest.mark.parametrize(
    ("model", "possible"),
    [
        (published.LLAMA_8B, [1, 2, 4, 8]),
        (published.QWEN2_5_05B, [1, 2]),  # 14 heads; 7 fails because of the 2 key-value heads
        (published.QWEN3_32B, [1, 2, 4, 8]),
        (published.DEEPSEEK_V3, [1, 2, 4, 8]),
        (published.MINILM, [1, 2, 3, 4, 6]),
    ],
    ids=lambda value: value.name if isinstance(value, Published) else "",
)
def test_sizes_that_divide(model: Published, possible: list[int]) -> None:
    """Heads, key-value heads (or their repetition), widths and the padded vocabulary, as vLLM's layers check."""
    assert [size for size in range(1, 9) if obstacle(model.architecture, Parallelism(tensor=size)) is None] == possible


def test_blocks_of_a_quantized_checkpoint_are_not_split() -> None:
    """Qwen3-30B-A3B-FP8: an expert's width of 768 over 4 devices is 192, and its scales cover 128."""
    config = {
        **published.QWEN3_30B_A3B.config,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    quantised = Published("Qwen/Qwen3-30B-A3B-FP8", config, 30.5, 0).architecture
    assert obstacle(published.QWEN3_30B_A3B.architecture, Parallelism(tensor=4)) is None
    assert obstacle(quantised, Parallelism(tensor=2)) is None
    assert "not a multiple of the quantization's 128" in (obstacle(quantised, Parallelism(tensor=4)) or "")


@pytest.mark.parametrize(
    ("model", "cards", "length", "expected"),
    [
        (published.LLAMA_8B, [24_564], 8192, 1),
        (published.LLAMA_8B, [24_564] * 2, 131_072, 2),
        (published.LLAMA_70B, [81_559] * 4, 8192, 4),  # 66 GiB on each of two leave too little for the rest
        (published.LLAMA_70B, [143_771] * 4, 8192, 2),
        (published.LLAMA_70B, [24_564] * 4, 8192, None),
        (published.QWEN2_5_05B, [12_288], 32_768, 1),
        (published.QWEN3_32B, [24_564, 24_564, 12_288, 12_288], 8192, None),  # four are limited by the smallest
        (published.DEEPSEEK_V3, [143_771] * 8, 32_768, 8),
    ],
    ids=lambda value: value.name if isinstance(value, Published) else "",
)
def test_smallest_number_of_devices(model: Published, cards: list[int], length: int, expected: int | None) -> None:
    """The answer is right for these models on common hosts."""
    devices = [Device(index=index, vram_total_mb=mb) for index, mb in enumerate(cards)]
    made = estimate(ModelFiles(model.name, model.architecture, None), EngineOptions(max_model_len=length), devices)
    assert made.tensor_parallel == expected, made.reasons


def logged(name: str, pattern: str) -> str:
    """The text of the pattern's group in a log."""
    found = re.search(pattern, (LOGS / name).read_text(encoding="utf-8"))
    assert found is not None, pattern
    return found[1]


def test_real_log_agrees_on_the_longest_sequence() -> None:
    """With 100,000 tokens vLLM reported the length that it derived; the estimate has a note."""
    derived = float(logged("toolong.txt", r"derived max_model_len \(max_position_embeddings=([\d.]+)"))
    asked = int(logged("toolong.txt", r"User-specified max_model_len \((\d+)\)"))
    config = {**published.QWEN3_8B.config, "max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default"}}
    model = Published("tiny", config, 0, 0)
    assert longest(model.architecture.text) == derived
    made = estimate(ModelFiles("tiny", model.architecture, None), EngineOptions(max_model_len=asked), [])
    assert made.notes == ("max_model_len 100000 is more than the model's 2048, which vLLM refuses by default",)


def test_real_log_agrees_on_what_900g_is() -> None:
    """vLLM printed its argument as a number, and in GiB when that was too much."""
    number = int(logged("kv.txt", r"'kv_cache_memory_bytes': (\d+)"))
    assert logged("kv.txt", r"requested memory for kv \(([\d.]+) GiB\)") == "900.0"
    assert human_number("900G", "--kv-cache-memory-bytes", "args") == number
