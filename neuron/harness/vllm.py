"""`vllm serve`: its command line and environment."""

from __future__ import annotations

from collections.abc import Sequence

from neuron.config import HarnessName
from neuron.harness import vllm_log
from neuron.harness.base import EngineCommand, HostFacts, LaunchPlan
from neuron.harness.environment import engine_environment
from neuron.harness.sleep_mode import guarded_environment, sleep_arguments, vllm_can_sleep
from neuron.owned_flags import gives
from shared.protocol import Progress

DEFAULT_COMMAND = ("vllm",)
_SIZES_MEMORY = ("--gpu-memory-utilization", "--device-memory-utilization", "--kv-cache-memory-bytes")
THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class VllmHarness:
    """Real vLLM, from an executable that may live in another virtual environment."""

    name: HarnessName = "vllm"
    health_path = "/health"
    runs_on_gpu = True
    sleeps_in_ram = True

    def command(self, plan: LaunchPlan, facts: HostFacts) -> EngineCommand:
        argv = serve_arguments(plan, DEFAULT_COMMAND)
        own: dict[str, str] = {}
        binding: dict[str, str] = {}
        if plan.devices:  # simulated ones too: a vLLM for the CPU passes over it
            argv += _memory_arguments(plan)
            own["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            own["CUDA_VISIBLE_DEVICES"] = ",".join(device.uuid or str(device.index) for device in plan.devices)
        if not facts.has_gpu and THREADS_BIND not in facts.environ:
            own |= cpu_binding(plan.spec.tensor_parallel, facts.cpus)
        if plan.control_key is not None and vllm_can_sleep(plan, facts):
            argv += sleep_arguments(plan, facts)
            binding = guarded_environment(plan, facts, plan.control_key)
        argv += plan.arguments
        return EngineCommand(tuple(argv), engine_environment(plan, facts.environ, own, binding))

    def can_sleep(self, plan: LaunchPlan, facts: HostFacts) -> bool:
        return vllm_can_sleep(plan, facts)

    def progress_of(self, line: str) -> Progress | None:
        return vllm_log.progress_of(line)

    def root_cause(self, lines: Sequence[str]) -> str | None:
        return vllm_log.root_cause(lines)

    def weights_mb(self, lines: Sequence[str], ranks: int) -> int | None:
        return vllm_log.weights_mb(lines, ranks)


def serve_arguments(plan: LaunchPlan, default_command: Sequence[str]) -> list[str]:
    """The part of the command line that vLLM and its simulation share."""
    spec = plan.spec
    argv = [*(plan.settings.command or default_command), "serve", spec.source]
    argv += ["--served-model-name", spec.model_id, *spec.served_names]
    argv += ["--host", plan.host, "--port", str(plan.port)]
    if spec.tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(spec.tensor_parallel)]
    if spec.quant is not None:
        argv += ["--quantization", spec.quant]
    return argv


def _memory_arguments(plan: LaunchPlan) -> list[str]:
    """`--gpu-memory-utilization` for a spec that says how much it may take, unless its arguments size it already.

    vLLM takes one share for all its devices: the one that the smallest of them needs.
    """
    wanted = plan.spec.vram_mb
    totals = [device.vram_total_mb for device in plan.devices if device.vram_total_mb > 0]
    if wanted is None or not totals or gives(plan.arguments, *_SIZES_MEMORY):
        return []
    share = wanted / len(plan.devices) / min(totals)
    return ["--gpu-memory-utilization", f"{min(max(share, 0.02), 0.98):.2f}"]


def cpu_binding(ranks: int, cpus: Sequence[int]) -> dict[str, str]:
    """Cores for each rank of a tensor-parallel engine on a CPU host.

    vLLM's own binding wants a NUMA node for each rank and fails where there are fewer. With fewer cores than ranks it
    is left to vLLM all the same: ranks that share a core wait for each other in spin locks.
    """
    if not 1 < ranks <= len(cpus):
        return {}
    ordered = sorted(cpus)
    per_rank = len(ordered) // ranks
    parts = [ordered[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)]
    return {THREADS_BIND: "|".join(map(_core_list, parts))}


def _core_list(cores: Sequence[int]) -> str:
    """Cores as vLLM reads them: runs as `a-b`, separated by commas."""
    runs: list[tuple[int, int]] = []
    for core in cores:
        if runs and runs[-1][1] == core - 1:
            runs[-1] = (runs[-1][0], core)
        else:
            runs.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
