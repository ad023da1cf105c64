"""Well-known models: the relevant fields of their config.json, and their published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neuron.estimate.files.architecture import Architecture, architecture_of
from neuron.estimate.files.fields import Fields

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """`billions`: published number of parameters; `token_bytes`: size of a token in the KV cache of all layers, with 16
    bits a number on one device."""

    name: str
    config: Config
    billions: float
    token_bytes: int

    @property
    def architecture(self) -> Architecture:
        return architecture_of(Fields(self.config, "config.json"))


_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def _dense(*shape: str | int, **more: Any) -> Config:
    """`shape` in the order of `_SHAPE`."""
    return {**dict(zip(_SHAPE, shape, strict=True)), "torch_dtype": "bfloat16", **more}


LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B = Published(
    "meta-llama/Llama-3.1-8B",
    _dense(
        *("llama", 4096, 32, 32, 8, 14336, 128256),
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=131072,
        rope_scaling=LLAMA_ROPE,
        tie_word_embeddings=False,
    ),
    8.03,
    128 * 1024,
)
LLAMA_70B = Published(
    "meta-llama/Llama-3.1-70B",
    _dense(
        *("llama", 8192, 80, 64, 8, 28672, 128256),
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=131072,
        rope_scaling=LLAMA_ROPE,
        tie_word_embeddings=False,
    ),
    70.55,
    320 * 1024,
)
QWEN3_8B = Published(
    "Qwen/Qwen3-8B",
    _dense(
        *("qwen3", 4096, 36, 32, 8, 12288, 151936),
        architectures=["Qwen3ForCausalLM"],
        head_dim=128,
        max_position_embeddings=40960,
        max_window_layers=36,
        sliding_window=None,
        use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    8.19,
    144 * 1024,
)
QWEN3_32B = Published(
    "Qwen/Qwen3-32B",
    _dense(
        *("qwen3", 5120, 64, 64, 8, 25600, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    32.76,
    256 * 1024,
)
QWEN3_30B_A3B = Published(
    "Qwen/Qwen3-30B-A3B",
    _dense(
        *("qwen3_moe", 2048, 48, 32, 4, 6144, 151936),
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    30.53,
    96 * 1024,
)
QWEN2_5_05B = Published(
    "Qwen/Qwen2.5-0.5B",
    _dense(
        *("qwen2", 896, 24, 14, 2, 4864, 151936),
        max_position_embeddings=32768,
        max_window_layers=24,
        sliding_window=32768,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    0.494,
    12 * 1024,
)
MISTRAL_7B = Published(
    "mistralai/Mistral-7B-v0.3",
    _dense(
        *("mistral", 4096, 32, 32, 8, 14336, 32768),
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    7.248,
    128 * 1024,
)
MIXTRAL = Published(
    "mistralai/Mixtral-8x7B-v0.1",
    _dense(
        *("mixtral", 4096, 32, 32, 8, 14336, 32000),
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    46.70,
    128 * 1024,
)
DEEPSEEK_V3 = Published(
    "deepseek-ai/DeepSeek-V3",
    _dense(
        *("deepseek_v3", 7168, 61, 128, 128, 18432, 129280),
        architectures=["DeepseekV3ForCausalLM"],
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        moe_layer_freq=1,
        num_nextn_predict_layers=1,
        max_position_embeddings=163840,
        rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        tie_word_embeddings=False,
    ),
    671.0,
    61 * (512 + 64) * 2,
)
GEMMA3_27B = Published(
    "google/gemma-3-27b-it",
    {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 5376,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "intermediate_size": 21504,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    },
    27.01,  # 27.43 with the 0.42 of its vision encoder
    62 * 2 * 16 * 128 * 2,
)
GPT_OSS_20B = Published(
    "openai/gpt-oss-20b",
    _dense(
        *("gpt_oss", 2880, 24, 64, 8, 2880, 201088),
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"] * 12,
        sliding_window=128,
        max_position_embeddings=131072,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        tie_word_embeddings=False,
    ),
    20.91,
    48 * 1024,
)
QWEN3_NEXT = Published(
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    _dense(
        *("qwen3_next", 2048, 48, 16, 2, 5120, 151936),
        head_dim=256,
        full_attention_interval=4,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=262144,
        tie_word_embeddings=False,
    ),
    79.67,
    12 * 2 * 2 * 256 * 2,
)
FALCON_7B = Published(
    "tiiuae/falcon-7b",
    {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "multi_query": True,
        "new_decoder_architecture": False,
    },
    6.92,  # 7.22 with the output head, which is tied to the embeddings
    32 * 2 * 64 * 2,
)
OPT_125M = Published(
    "facebook/opt-125m",
    {
        "model_type": "opt",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    0.1252,
    12 * 2 * 768 * 2,
)
MINILM = Published(
    "sentence-transformers/all-MiniLM-L6-v2",
    {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    0.0227,
    0,
)
MODELS = (
    LLAMA_8B,
    LLAMA_70B,
    QWEN3_8B,
    QWEN3_32B,
    QWEN3_30B_A3B,
    QWEN2_5_05B,
    MISTRAL_7B,
    MIXTRAL,
    DEEPSEEK_V3,
    GEMMA3_27B,
    GPT_OSS_20B,
    QWEN3_NEXT,
    FALCON_7B,
    OPT_125M,
    MINILM,
)
