"""The command line: vLLM's flags, and flags of the simulation alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from neuron.gpu.simulated_vram import DEFAULT_DEVICE_VRAM_MB
from neuron.sim.engine.faults import Fault, Faults

DEFAULT_MAX_MODEL_LEN = 32768

# Accepted and ignored, so that a model's vLLM arguments also start its simulation.
_INERT_WITH_VALUE = (
    "--chat-template", "--convert", "--cpu-offload-gb", "--disable-access-log-for-endpoints",
    "--distributed-executor-backend", "--download-dir", "--dtype", "--generation-config", "--gpu-memory-utilization",
    "--hf-overrides", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--limit-mm-per-prompt", "--load-format",
    "--max-num-batched-tokens", "--middleware", "--override-generation-config", "--quantization", "--reasoning-parser",
    "--revision", "--runner", "--seed", "--shutdown-timeout", "--speculative-config", "--tokenizer",
    "--tool-call-parser", "--uvicorn-log-level",
)  # fmt: skip
_INERT_SWITCHES = (
    "--async-scheduling", "--disable-log-stats", "--disable-uvicorn-access-log",
    "--enable-chunked-prefill", "--enable-log-requests", "--enable-prefix-caching", "--enable-sleep-mode",
    "--enforce-eager", "--language-model-only", "--no-enable-prefix-caching", "--no-enable-sleep-mode",
    "--trust-remote-code",
)  # fmt: skip
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHORT = {"--quantization": ["-q"]}

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class NodeOfGroup:
    """One process of an engine on several hosts: its `rank` among `count`, and where rank 0 listens."""

    count: int
    rank: int
    address: str
    port: int


@dataclass(frozen=True)
class EngineSettings:
    """How one simulated engine behaves. Times in seconds, memory in MiB."""

    model: str
    host: str
    port: int
    served_names: tuple[str, ...]
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: bool
    group: NodeOfGroup | None
    headless: bool  # it has no HTTP server
    max_model_len: int  # tokens, prompt and answer together
    max_num_seqs: int  # sequences generated at once; others wait
    track_load: bool
    auto_tools: bool  # tools are called without tool_choice
    load_secs: float  # from the start or the end of the download until /health answers
    download_secs: float  # simulated download before the load; 0: none
    ttft_secs: float  # from a request's start to its first token
    tokens_per_sec: float  # of each sequence; inf: as fast as possible
    vram_mb: int  # all devices together
    answer_tokens: int | None  # tokens of an answer that ends by itself; None: what the text has
    embedding_dims: int
    wake_secs: float  # from /wake_up to awake
    faults: Faults
    max_loras: int | None = None  # None: without --enable-lora
    max_lora_rank: int = 16

    @property
    def devices(self) -> int:
        """How many of this host it is split over."""
        everywhere = self.tensor_parallel * self.pipeline_parallel * self.data_parallel
        return everywhere // (1 if self.group is None else self.group.count)

    @property
    def name(self) -> str:
        """The name in metrics and for requests without a `model`."""
        return self.served_names[0]


def human_readable_int_or_auto(value: str) -> int:
    """A number of tokens in vLLM's notation: 4096, 32k (thousands), 32K (1024s), 1.5M, auto (here the default).

    Raises:
        ValueError: it is anything else. (argparse turns this into vLLM's message, with this function's name.)
    """
    if value == "auto":
        return DEFAULT_MAX_MODEL_LEN
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", value)
    if match is None or int(float(match[1])) < 1:
        raise ValueError(value)
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def positive_int(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(value)
    return number


def not_negative(value: str) -> float:
    number = float(value)
    if not number >= 0:
        raise ValueError(value)
    return number


def positive(value: str) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(value)
    return number


def _add_vllm_flags(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("model", metavar="MODEL")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--served-model-name", nargs="+", default=None, metavar="NAME")
    serve.add_argument("--tensor-parallel-size", "-tp", type=positive_int, default=1)
    serve.add_argument("--pipeline-parallel-size", "-pp", type=positive_int, default=1)
    serve.add_argument("--data-parallel-size", "-dp", type=positive_int, default=1)
    serve.add_argument("--nnodes", "-n", type=positive_int, default=1)
    serve.add_argument("--node-rank", "-r", type=int, default=0)
    serve.add_argument("--master-addr", default="127.0.0.1")
    serve.add_argument("--master-port", type=int, default=29501)
    serve.add_argument("--headless", action="store_true")
    serve.add_argument("--enable-expert-parallel", "-ep", action=argparse.BooleanOptionalAction, default=False)
    serve.add_argument("--max-model-len", type=human_readable_int_or_auto, default=DEFAULT_MAX_MODEL_LEN)
    serve.add_argument("--max-num-seqs", type=positive_int, default=256)
    serve.add_argument("--enable-server-load-tracking", action="store_true")
    serve.add_argument("--enable-lora", action=argparse.BooleanOptionalAction, default=False)
    serve.add_argument("--max-loras", type=positive_int, default=1)
    serve.add_argument("--max-lora-rank", type=int, default=16, choices=_LORA_RANKS)
    # On by default, unlike vLLM's: nothing has to be parsed, so it works for every model.
    serve.add_argument("--enable-auto-tool-choice", action=argparse.BooleanOptionalAction, default=True)
    for flag in _INERT_WITH_VALUE:
        serve.add_argument(flag, *_SHORT.get(flag, []), help=argparse.SUPPRESS)
    for flag in _INERT_SWITCHES:
        serve.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def _add_simulation_flags(serve: argparse.ArgumentParser) -> None:
    group = serve.add_argument_group("simulation")
    group.add_argument("--load-secs", type=not_negative, default=1.0, help="from start to ready (default 1.0)")
    group.add_argument("--download-secs", type=not_negative, default=0.0, help="of a download before that (default 0)")
    group.add_argument("--ttft-ms", type=not_negative, default=20.0, help="time to first token (default 20)")
    group.add_argument("--tokens-per-sec", type=positive, default=200.0, help="of each sequence; inf is allowed")
    group.add_argument(
        "--vram-mb", type=positive_int, default=None, help=f"all devices together ({DEFAULT_DEVICE_VRAM_MB} a device)"
    )
    group.add_argument(
        "--answer-tokens",
        type=positive_int,
        default=None,
        help="after which an answer ends by itself (default: about 60)",
    )
    group.add_argument("--embedding-dims", type=positive_int, default=64)
    group.add_argument("--wake-secs", type=not_negative, default=0.1, help="from sleep to awake (default 0.1)")
    group.add_argument(
        "--fault",
        action="append",
        default=[],
        choices=[fault.value for fault in Fault],
        help="misbehave in this way; may be given several times",
    )
    group.add_argument(
        "--fault-after",
        type=not_negative,
        default=None,
        metavar="N",
        help="tokens (die-mid-stream, hang), requests (bad-health) or seconds (crash-after-secs) until the fault; "
        "seconds that each prompt takes (slow-prefill)",
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuron.sim", description="A simulated vLLM.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a simulated model", allow_abbrev=False)
    _add_vllm_flags(serve)
    _add_simulation_flags(serve)
    return parser


def parse(argv: Sequence[str]) -> EngineSettings:
    """The settings of a command line. On an error it exits with status 2, as argparse does."""
    given = build_parser().parse_args(argv)
    devices = given.tensor_parallel_size * given.pipeline_parallel_size * given.data_parallel_size // given.nnodes
    group = NodeOfGroup(given.nnodes, given.node_rank, given.master_addr, given.master_port)
    return EngineSettings(
        model=given.model,
        host=given.host,
        port=given.port,
        served_names=tuple(given.served_model_name or [given.model]),
        tensor_parallel=given.tensor_parallel_size,
        pipeline_parallel=given.pipeline_parallel_size,
        data_parallel=given.data_parallel_size,
        expert_parallel=given.enable_expert_parallel,
        group=None if given.nnodes == 1 else group,
        headless=given.headless,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        track_load=given.enable_server_load_tracking,
        auto_tools=given.enable_auto_tool_choice,
        load_secs=given.load_secs,
        download_secs=given.download_secs,
        ttft_secs=given.ttft_ms / 1000,
        tokens_per_sec=given.tokens_per_sec,
        vram_mb=given.vram_mb or DEFAULT_DEVICE_VRAM_MB * devices,
        answer_tokens=given.answer_tokens,
        embedding_dims=given.embedding_dims,
        wake_secs=given.wake_secs,
        max_loras=given.max_loras if given.enable_lora else None,
        max_lora_rank=given.max_lora_rank,
        faults=Faults(frozenset(Fault(name) for name in given.fault), given.fault_after),
    )
