"""`vllm serve`: its command line and environment. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from neuron.config import HarnessSettings
from neuron.harness.base import (
    EarlyImports,
    EngineCommand,
    GroupNetwork,
    Harness,
    LaunchFacts,
    LaunchPlan,
    memory_fraction,
)
from neuron.harness.environment import device_variables, engine_environment
from neuron.harness.vllm.activity import VllmActivity
from neuron.harness.vllm.argument_policy import flag_value, has_flag, refused_in_group
from neuron.harness.vllm.code_arguments import code_argument
from neuron.harness.vllm.control.lora import UPDATING_VARIABLE, VllmAdapters, lora_arguments
from neuron.harness.vllm.early_imports import THREADS_BIND, early_imports
from neuron.harness.vllm.errors import cause_of, is_permanent, root_cause
from neuron.harness.vllm.estimate.estimator import VllmEstimator
from neuron.harness.vllm.estimate.overhead import CPU_PROCESSES_MB
from neuron.harness.vllm.memory_flags import SIZES_MEMORY, UTILIZATION
from neuron.harness.vllm.phases import VllmLoadReading
from neuron.harness.vllm.ray import spans_with_ray, with_ray
from neuron.harness.vllm.sleep_mode import (
    VllmSleep,
    guard_arguments,
    guarded_environment,
    sleep_arguments,
    vllm_can_sleep,
)
from neuron.harness.vllm.tools import tool_arguments
from neuron.memory.requirement import MemoryRequirement
from neuron.progress.phases import LoadReading
from neuron.spec import EngineSpec
from shared.gpus import DEFAULT_ENGINE_SHARE
from shared.protocol import FailureCause, GroupPart
from shared.protocol.context_length import AUTO
from shared.protocol.reserved_arguments import CONTEXT_FLAG, refused_argument, sets_context

DEFAULT_COMMAND = ("vllm",)
CPU_CACHE: Final = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of KV cache of a vLLM on the CPU, instead of a fraction of the memory."""
# Set for each engine, so an inherited value would at best be wrong. VLLM_PORT is for vLLM's internal ports: engines
# that share it collide. Development mode and the loading of adapters open routes to everyone who reaches an engine: set
# them in `env` to have them.
KEEP_ALIVE: Final = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
"""How long vLLM's server keeps an idle connection, in seconds."""
KEEP_ALIVE_SECS: Final = 75
"""vLLM's own default, 5, is shorter than the pauses between bursts of requests, each of which then waits for a new
connection."""
_NOT_INHERITED = frozenset({"VLLM_API_KEY", "VLLM_PORT", "VLLM_SERVER_DEV_MODE", UPDATING_VARIABLE})


class VllmHarness(Harness):
    """Real vLLM, from an executable that may live in another virtual environment."""

    runs_on_gpu = True
    spans_hosts = True
    sizes_itself = True
    cache_variables = MappingProxyType({"VLLM_CACHE_ROOT": "vllm"})
    activity = VllmActivity()
    sleep = VllmSleep()
    adapters = VllmAdapters()
    estimator = VllmEstimator()
    python_package = "vllm"
    option_files: tuple[str, ...] = (
        "vllm/engine/arg_utils.py",
        "vllm/entrypoints/openai/cli_args.py",
        "vllm/entrypoints/launchers/cli_args.py",
    )
    version_arguments: tuple[str, ...] = ("--version",)

    def program(self, settings: HarnessSettings) -> tuple[str, ...]:
        return tuple(settings.command or DEFAULT_COMMAND)

    def memory_requirement(self, spec: EngineSpec, share_mb: int | None, args: Sequence[str]) -> MemoryRequirement:
        """The fraction that its arguments set, else `share_mb`, else vLLM's default fraction."""
        with contextlib.suppress(ValueError):
            fraction = float(flag_value(args, *UTILIZATION) or "")
            if 0 < fraction <= 1:
                return MemoryRequirement(fraction=fraction)
        if share_mb is None:
            return MemoryRequirement(fraction=DEFAULT_ENGINE_SHARE)
        return MemoryRequirement(share_mb, one_fraction=not has_flag(args, *SIZES_MEMORY))

    def keep_alive_secs(self, env: Mapping[str, str]) -> float | None:
        with contextlib.suppress(ValueError):
            return float(max(0, int(env.get(KEEP_ALIVE, ""))))
        return None

    def early_imports(self, env: Mapping[str, str]) -> EarlyImports:
        return early_imports(env)

    def command(self, plan: LaunchPlan, facts: LaunchFacts) -> EngineCommand:
        argv = serve_arguments(plan, DEFAULT_COMMAND)
        own: dict[str, str] = {}
        if plan.devices:  # simulated ones too: a vLLM for the CPU ignores them
            argv += _memory_arguments(plan)
            # vLLM 0.22 and older end with an error on the UUID of a GPU.
            own |= device_variables(plan.devices, facts, "index" if plan.installed.before(0, 23) else "uuid")
        else:
            argv += _ram_arguments(plan, facts)
        on_cpu = not facts.has_gpu or plan.ram_mb is not None
        if on_cpu and THREADS_BIND not in facts.environ:
            own |= cpu_binding(plan.spec.device_count, facts.cpus, plan.cores)
        sleeps = self.can_sleep(plan, facts)
        fixed = guarded_environment(plan, facts, sleeps=sleeps)
        argv += guard_arguments() if fixed else []
        argv += sleep_arguments(plan, facts) if sleeps else []
        argv += lora_arguments(plan.spec)
        argv += [*plan.arguments, *context_arguments(plan.spec)]
        return with_ray(plan, EngineCommand(tuple(argv), vllm_environment(plan, facts, own, fixed)))

    def tool_arguments(self, names: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
        return tool_arguments(names, args)

    def can_sleep(self, plan: LaunchPlan, facts: LaunchFacts) -> bool:
        return vllm_can_sleep(plan, facts)

    def refused_argument(self, args: Sequence[str]) -> str | None:
        return refused_argument(args)

    def refused_in_group(self, args: Sequence[str]) -> str | None:
        return refused_in_group(args)

    def refused_spec(self, spec: EngineSpec) -> tuple[str, str] | None:
        if spec.max_model_len is not None and sets_context(spec.args):
            return "max_model_len", f"{CONTEXT_FLAG} is in its args too, remove one of them"
        return super().refused_spec(spec)

    def code_argument(self, args: Sequence[str]) -> str | None:
        return code_argument(args)

    def first_reading(self) -> LoadReading:
        return VllmLoadReading()

    def root_cause(self, lines: Sequence[str]) -> str | None:
        return root_cause(lines)

    def cause_of(self, error: str, *, path_missing: bool) -> FailureCause:
        return cause_of(error, path_missing=path_missing)

    def is_permanent(self, error: str, *, path_missing: bool) -> bool:
        return is_permanent(error, path_missing=path_missing)


def serve_arguments(plan: LaunchPlan, default_command: Sequence[str]) -> list[str]:
    """The part of the command line that vLLM and its simulation share."""
    spec = plan.spec
    argv = [*(plan.settings.command or default_command), "serve", spec.source]
    argv += ["--served-model-name", spec.model_id, *spec.served_names]
    argv += ["--host", plan.host, "--port", str(plan.port)] if spec.serves else ["--headless"]
    argv += parallel_arguments(spec)
    if spec.group is not None and not spans_with_ray(plan):
        argv += group_arguments(spec.group)
    if spec.quant is not None:
        argv += ["--quantization", spec.quant]
    return argv


def parallel_arguments(spec: EngineSpec) -> list[str]:
    """Those that split the model over its devices, in a group those of all parts. On these vLLM's ranks are in the
    order copy, pipeline stage, tensor rank."""
    sizes = {
        "--tensor-parallel-size": spec.tensor_parallel,
        "--pipeline-parallel-size": spec.pipeline_parallel,
        "--data-parallel-size": spec.data_parallel,
    }
    argv = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
    return [*argv, "--enable-expert-parallel"] if spec.expert_parallel else argv


def context_arguments(spec: EngineSpec) -> list[str]:
    """Those that limit the context. They come last: of two equal flags vLLM takes the last, and a host's `extra_args`
    must not make the model's longer. vLLM fits `auto` to its memory itself."""
    if spec.context is not None:
        return [CONTEXT_FLAG, str(spec.context)]
    return [CONTEXT_FLAG, AUTO] if spec.max_model_len == AUTO and spec.fitted_len is None else []


def group_arguments(part: GroupPart) -> list[str]:
    """Those of vLLM's own multi-node engine. Its ranks on the nodes follow one another."""
    master = ["--master-addr", part.master_addr, "--master-port", str(part.master_port)]
    return ["--nnodes", str(part.size), "--node-rank", str(part.rank), *master]


def network_environment(network: GroupNetwork, inherited: Mapping[str, str]) -> dict[str, str]:
    """Which address and interface vLLM, NCCL and gloo use between the parts of a group. neuron's own environment goes
    before the interface that neuron found."""
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    found = {} if network.interface is None else {name: inherited.get(name, network.interface) for name in names}
    return {"VLLM_HOST_IP": network.address, **found, **network.env}


def vllm_environment(
    plan: LaunchPlan, facts: LaunchFacts, own: Mapping[str, str], fixed: Mapping[str, str]
) -> dict[str, str]:
    """The part of the environment that vLLM and its simulation share. The operator's `env` overrides `own` but not
    `fixed`."""
    inherited = {name: value for name, value in facts.environ.items() if name not in _NOT_INHERITED}
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **own}
    if plan.network is not None:
        defaults |= network_environment(plan.network, inherited)
    defaults[KEEP_ALIVE] = facts.environ.get(KEEP_ALIVE, str(KEEP_ALIVE_SECS))
    # vLLM's processes overwrite their environment when they set their title, unless SPT_NOENV is set: then the engine's
    # id stays readable in /proc/PID/environ of each.
    made = engine_environment(plan, inherited, defaults, {**fixed, "SPT_NOENV": "1"})
    # An operator's key in `env` would be unknown to neuron's callers.
    made.pop("VLLM_API_KEY", None)
    return made if plan.api_key is None else {**made, "VLLM_API_KEY": plan.api_key}


def _memory_arguments(plan: LaunchPlan) -> list[str]:
    """`--gpu-memory-utilization` for an engine with a share, unless its arguments already size its memory.

    vLLM has one fraction for all devices, calculated from the smallest. On a larger device the same fraction is more,
    and that is what is booked there (`MemoryRequirement.one_fraction`): vLLM refuses to start unless it is free, though
    it uses no more blocks than fit on the smallest.
    """
    fraction = plan.device_fraction
    if fraction is None or has_flag(plan.arguments, *SIZES_MEMORY):
        return []
    return ["--gpu-memory-utilization", fraction]


def _ram_arguments(plan: LaunchPlan, facts: LaunchFacts) -> list[str]:
    """The same for an engine on the CPU: a fraction of the memory of the NUMA node, which a worker then holds, its
    weights included. Without it a worker takes 92 % of the node. The other processes of the engine are not part of it.
    A size of the cache that the operator has set goes first."""
    given = (*plan.settings.env, *facts.environ)
    if plan.share_mb is None or not facts.node_ram_mb or plan.ram_mb is None or CPU_CACHE in given:
        return []
    if has_flag(plan.arguments, *SIZES_MEMORY):
        return []
    worker_mb = max(plan.share_mb // 2, plan.share_mb - CPU_PROCESSES_MB // plan.spec.device_count)
    return ["--gpu-memory-utilization", memory_fraction(worker_mb, facts.node_ram_mb)]


def cpu_binding(ranks: int, cpus: Sequence[int], cores: Sequence[int] = ()) -> dict[str, str]:
    """Cores for each rank of an engine on the CPU, in the order of the ranks: `cores`, where the engine gets only some
    of the host's `cpus`.

    vLLM's own binding needs a NUMA node for each rank and fails with fewer. With fewer cores than ranks it is left to
    vLLM anyway: ranks that share a core would wait for each other in spin locks.
    """
    some = bool(cores) and set(cores) < set(cpus)
    ordered = sorted(cores if some else cpus)
    if not (1 if some else 2) <= ranks <= len(ordered):
        return {}
    per_rank = len(ordered) // ranks
    parts = [ordered[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)]
    return {THREADS_BIND: "|".join(map(_core_list, parts))}


def _core_list(cores: Sequence[int]) -> str:
    """Cores in vLLM's notation: ranges `a-b`, separated by commas."""
    runs: list[tuple[int, int]] = []
    for core in cores:
        if runs and runs[-1][1] == core - 1:
            runs[-1] = (runs[-1][0], core)
        else:
            runs.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
