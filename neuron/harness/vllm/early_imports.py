"""What a spare process of vLLM imports, and which variables it does not read meanwhile. Pure.

Measured with vLLM 0.32 on the CPU: `vllm serve` imports for 6 to 7 s, and so do its core and each of its workers, which
it starts one after the other with `spawn`. The variables are those that neuron or vLLM changes and that no import
reads, neither through `os.environ` nor through `getenv`. Imports do read several hundred others: of VLLM_*, TORCH*,
HF_*, OMP_NUM_THREADS. `VLLM_SERVER_DEV_MODE` is one of them (the default of `log_error_stack`).

Imports touch no GPU: vLLM finds its platform with NVML, which has no CUDA context, and closes it. Some modules ask NVML
for the compute capability of the first visible device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from neuron.harness.base import EarlyImports
from neuron.harness.vllm.guard.neuron_guard import DIGEST_VARIABLE

THREADS_BIND: Final = "VLLM_CPU_OMP_THREADS_BIND"
LATE_VARIABLES: Final = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "VLLM_API_KEY",
        THREADS_BIND,
        DIGEST_VARIABLE,
        # vLLM sets these for its children.
        "LOCAL_WORLD_SIZE",
        "NCCL_GRAPH_REGISTER",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "VLLM_OMP_NUM_THREADS_SET_BY_VLLM",
        "VLLM_SSM_CONV_STATE_LAYOUT",
        "VLLM_WORKER_MULTIPROC_METHOD",
    }
)

# Set on a CPU host for the workers, which compute and are spawned. The core there only schedules, and does without the
# allocator and the OpenMP library in LD_PRELOAD.
_WORKERS_ON_CPU: Final = frozenset({"LD_PRELOAD", "NUMEXPR_MAX_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS"})
_MODULES: Final = (
    "vllm.entrypoints.cli.main",
    # What its main() and the server import when they run.
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "model_hosting_container_standards.sagemaker",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
    # The core and the workers.
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.worker.gpu_worker",
    "setproctitle",
)


def early_imports(env: Mapping[str, str]) -> EarlyImports:
    """For a vLLM with this environment."""
    core_computes = env.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    return EarlyImports(
        modules=_MODULES,
        late_variables=LATE_VARIABLES,
        spawns=True,
        child_variables={} if core_computes else {"EngineCore": _WORKERS_ON_CPU},
    )
