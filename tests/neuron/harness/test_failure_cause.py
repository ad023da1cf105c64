"""The cause of a failed load: the node, the model, or unknown."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from neuron.errors import VramNotReleased, load_cancelled, stopping
from neuron.harness.registry import HARNESSES
from neuron.harness.vllm.errors import root_cause
from neuron.lifecycle.failure_cause import cause_of, cause_of_end, is_permanent_end
from neuron.memory.capacity import InsufficientVram
from neuron.spec import InstanceKey
from shared.errors import InvalidRequest, ServiceError, Unavailable
from shared.protocol import FailureCause
from tests.neuron.neurons import Neuron, config_of, marked_engines, neuron_here, until

LOGS = Path(__file__).parent / "vllm_logs"
MODEL = "org/model"
VLLM = HARNESSES["vllm"]


@pytest.mark.parametrize(
    ("log", "path_missing", "cause", "permanent"),
    [
        ("badflag", False, "model", True),
        ("badflag", True, "model", True),
        ("badvalue", False, "model", True),
        ("nopath", True, "node", True),
        ("nopath", False, "model", True),
        ("offline", False, "node", False),
        ("toolong", False, "model", True),
        ("kv", False, "node", False),
        ("sleep", False, "node", False),
        ("tp2", False, "node", False),
    ],
)
def test_real_failures(log: str, path_missing: bool, cause: str, permanent: bool) -> None:
    """Logs of vLLM 0.32. A path that this host lacks may exist on another; a wrong flag fails everywhere. What the next
    start on this host meets too is permanent."""
    lines = (LOGS / f"{log}.txt").read_text().splitlines()
    assert cause_of_end(VLLM, 1, lines, path_missing=path_missing).value == cause
    assert is_permanent_end(VLLM, 1, lines, path_missing=path_missing) is permanent


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "node"),
        (
            "ValueError: Free memory on device cuda:0 (3.25/23.43 GiB) on startup is less than desired GPU memory",
            "node",
        ),
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "node"),
        ("ValueError: 5.1 GiB KV cache is needed, which is larger than the available KV cache memory (4 GiB).", "node"),
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", "node"),
        ("RuntimeError: Found no NVIDIA driver on your system.", "node"),
        ("RuntimeError: NCCL error: unhandled system error", "node"),
        ("ImportError: libcudart.so.13: cannot open shared object file", "node"),
        ("OSError: [Errno 28] No space left on device", "node"),
        ("The quantization method fp8 is not supported for the current GPU. Minimum capability: 89.", "node"),
        ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.", "node"),
        ("RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': -9}", "node"),
        ("Model architectures ['XForCausalLM'] are not supported for now. Supported architectures: a", "model"),
        ("ValueError: Model architectures ['X'] are not supported for now.", "model"),
        ("Quantization method specified in the model config (awq) does not match the quantization method", "model"),
        ("RepositoryNotFoundError: 404 Client Error.", "model"),
        ("OSError: Can't load tokenizer for 'org/model'.", "model"),
        ("ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).", "model"),
        ("RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': 1}", "unknown"),
        ("KeyError: 'layers.0.weight'", "unknown"),
    ],
)
def test_error_messages(error: str, cause: str) -> None:
    """Real error lines of vLLM tell whether the host or the model is at fault."""
    assert VLLM.cause_of(error, path_missing=False).value == cause


@pytest.mark.parametrize(
    ("code", "lines", "path_missing", "cause"),
    [
        (-signal.SIGKILL, ["ValueError: Model architectures ['X'] are not supported for now."], False, "node"),
        (127, ["exec: vllm: not found"], False, "node"),
        (-signal.SIGSEGV, [], False, "unknown"),
        (1, [], False, "unknown"),
        (1, [], True, "node"),
        (None, ["OSError: [Errno 28] No space left on device"], False, "node"),
    ],
)
def test_exits(code: int | None, lines: list[str], path_missing: bool, cause: str) -> None:
    """A signal outweighs the output before it."""
    assert cause_of_end(VLLM, code, lines, path_missing=path_missing).value == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (InsufficientVram("it needs more", []), "node"),
        (VramNotReleased("held"), "node"),
        (stopping(), "node"),
        (Unavailable("none", code="no_free_port", retry_after=1), "node"),
        (InvalidRequest("no device 7", param="devices"), "node"),
        (InvalidRequest("refused", param="args"), "model"),
        (load_cancelled(InstanceKey(MODEL)), "unknown"),
        (ServiceError("internal error"), "unknown"),
        (ServiceError("said", code="load_timeout", extra={"cause": "model"}), "model"),
    ],
)
def test_refusals(error: ServiceError, cause: str) -> None:
    """The cause follows from the error code, unless the error carries its own."""
    assert cause_of(error).value == cause


@pytest.mark.parametrize(
    ("args", "fields", "cause"),
    [
        (("--no-such-flag",), {}, "model"),
        (("--fault", "unsupported-model"), {}, "model"),
        (("--fault", "oom-at-load"), {}, "node"),
        ((), {"devices": [7]}, "node"),
        ((), {"vram_mb": 1_000_000}, "node"),
        ((), {"args": ["--port", "1"]}, "model"),
    ],
)
async def test_a_load_error_has_the_cause(
    neuron: Neuron, args: tuple[str, ...], fields: dict[str, Any], cause: str
) -> None:
    """The cause is in the error object beside the message, and in the entry of the failed model."""
    answer = await neuron.load(MODEL, *args, **fields)
    assert answer.error["cause"] == cause, answer.body
    view = await neuron.model(MODEL)
    assert view.get("cause") == (cause if view.get("status") == "failed" else None)
    assert (await neuron.load(MODEL)).status == 200
    assert (await neuron.model(MODEL))["cause"] is None


async def test_killed_while_loading(neuron: Neuron, mark: str) -> None:
    """SIGKILL, which the host's out-of-memory killer sends, is a fault of the node."""
    loading = asyncio.create_task(neuron.load(MODEL, "--load-secs", "10"))
    (engine,) = await until(lambda: marked_engines(mark))
    os.kill(engine, signal.SIGKILL)
    assert (await loading).error["cause"] == "node"


@pytest.mark.parametrize(
    ("settings", "args"),
    [
        ({"command": ["/nowhere/vllm"]}, ()),
        ({"startup_timeout_secs": 0.5}, ("--fault", "never-ready")),
        ({"port_range": []}, ()),
    ],
)
async def test_faults_of_the_host(mark: str, tmp_path: Path, settings: dict[str, Any], args: tuple[str, ...]) -> None:
    """A missing executable, a timeout and a lack of ports are the node's fault."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if not settings.get("port_range", True):
            settings = {"port_range": [taken.getsockname()[1]] * 2}
        async with neuron_here(config_of(tmp_path / "state", sim=settings)) as neuron:
            assert (await neuron.load(MODEL, *args)).error["cause"] == "node"


def test_the_simulation_reports_errors_like_vllm() -> None:
    """A model that it simulates not to support fails with vLLM's message."""
    lines = ["  Value error, Model architectures ['NoSuchForCausalLM'] are not supported for now. [type=value_error]"]
    lines.insert(0, "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig")
    found = root_cause(lines)
    assert found is not None
    assert HARNESSES["sim"].cause_of(found, path_missing=False) is FailureCause.MODEL
