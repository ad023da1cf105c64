"""Memory besides weights and KV cache, which vLLM measures when it starts. Pure.

The constants are conservative allowances from vLLM's logs on real GPUs: an excess becomes KV cache, a shortfall keeps
the engine from starting.
"""

from __future__ import annotations

from dataclasses import dataclass

from neuron.estimate.files.architecture import Architecture
from neuron.estimate.options import EngineOptions
from neuron.estimate.result import MIB

CONTEXT_BYTES = 640 * MIB
"""CUDA's context, library workspaces and loaded kernels: 0.4 to 0.6 GiB per process on Ampere to Blackwell."""
COMMUNICATION_BYTES = 1024 * MIB
"""NCCL's channels and the buffers of vLLM's own all-reduce (64 MiB for two devices), with two or more devices. For
Llama 3 8B vLLM logged (pull request 10511) 1.8 GiB outside PyTorch on one H100 and twice that on each of two; this
included the neighbour's context."""
GRAPH_BYTES_PER_LAYER = 20 * MIB
"""CUDA graphs of the default 51 and 35 batch sizes: vLLM logs 0.5 to 0.8 GiB for models of 32 to 36 layers."""
CPU_PROCESSES_MB = 2048
"""What the API server and the core of a vLLM on the CPU use of the host's RAM beside its workers."""
LOGIT_BYTES = 28
"""Peak of the sampler per sequence and vocabulary entry: logits of 2 and 4 bytes, sorted values 4 and indices 8,
probabilities 4, their sums 4, and a share of the mask. vLLM runs it once with all sequences: 256 x 128,256 entries are
0.9 GiB; the log of Llama 3 8B has 1.26 GiB of activations in total."""


@dataclass(frozen=True)
class Batching:
    """What an engine computes in one step."""

    sequences: int
    tokens: int


def batching_of(options: EngineOptions, *, max_model_len: int, device_mb: int, device_name: str) -> Batching:
    """`--max-num-seqs` and `--max-num-batched-tokens`, with the defaults of vLLM 0.32 for a device."""
    if device_mb >= 160 * 1024:
        tokens, sequences = 16384, 1024
    elif device_mb >= 70 * 1024 and "a100" not in device_name.lower():
        tokens, sequences = 8192, 1024
    else:
        tokens, sequences = 2048, 256
    asked = options.max_num_seqs or sequences
    batched = options.max_num_batched_tokens or min(asked * max_model_len, tokens)
    return Batching(sequences=asked if options.max_num_seqs else min(asked, batched), tokens=batched)


def activation_bytes(model: Architecture, batching: Batching, *, bits: int, devices: int, pooling: bool) -> float:
    """Peak of the intermediate results on each device: one layer for a whole batch, or the sampler."""
    attention = (model.heads + 2 * model.kv_heads) * model.head_dim / devices + model.hidden
    feed_forward = 3 * model.intermediate / devices if model.gated else 2 * model.intermediate / devices
    widest = max(attention, feed_forward, _experts_width(model, devices))
    layer = batching.tokens * (2 * model.hidden + widest) * bits / 8  # plus the residual and the layer's input
    if pooling or model.encoder_only:
        return layer
    rows = min(batching.sequences, batching.tokens)
    return max(layer, rows * (model.vocabulary * LOGIT_BYTES + model.hidden * bits / 8))


def graph_bytes(model: Architecture, options: EngineOptions) -> float:
    """On each device; 0 with `--enforce-eager` and for encoders, which are not captured."""
    return 0 if options.eager or model.encoder_only else model.layers * GRAPH_BYTES_PER_LAYER


def _experts_width(model: Architecture, devices: int) -> float:
    experts = model.experts
    if experts is None:
        return 0
    inner = experts.width / devices
    return experts.chosen * (max(2 * inner, model.hidden) + inner) + 3 * experts.shared_width / devices
