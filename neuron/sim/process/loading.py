"""The load: vLLM's progress lines at realistic times, and memory that fills up with the weights."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from neuron.sim.engine import console
from neuron.sim.engine.arguments import EngineSettings
from neuron.sim.engine.faults import Fault
from neuron.sim.engine.memory import DeviceMemory, OutOfMemory

_SHARDS = 4
_FILE_GB = 4.98
_WEIGHTS = 0.6  # of all memory that a model takes; the rest is the KV cache
Announcement = Callable[[EngineSettings, int], None]  # the engine's settings and the pid of its core


@dataclass(frozen=True)
class Stage:
    """A point of the load: `at` is the fraction of the load time, `memory` the fraction of the memory held by then."""

    at: float
    memory: float
    announce: Announcement


def _log(source: str, text: str) -> Announcement:
    """Logs `text` with `{model}`, `{gib}` and seconds filled in."""
    from_server = source.startswith(("model.py", "api_server.py"))
    return lambda settings, core: console.log(
        "APIServer" if from_server else "EngineCore",
        source,
        text.format(
            model=settings.model,
            parallel=_parallel(settings),
            secs=settings.load_secs,
            weights=settings.load_secs * 0.5,
            compiling=settings.load_secs * 0.02,
            gib=_WEIGHTS * settings.vram_mb / settings.devices / 1024,
        ),
        pid=None if from_server else core,
    )


def _parallel(settings: EngineSettings) -> str:
    """vLLM's words for it; none for a model that is at most tensor-parallel."""
    if settings.pipeline_parallel == settings.data_parallel == 1 and not settings.expert_parallel:
        return ""
    return (
        f", tensor_parallel_size={settings.tensor_parallel}, pipeline_parallel_size={settings.pipeline_parallel}, "
        f"data_parallel_size={settings.data_parallel}, enable_expert_parallel={settings.expert_parallel}"
    )


def _bar(text: str) -> Announcement:
    return lambda _settings, core: console.raw("EngineCore", text, pid=core)


def _shard(done: int) -> Stage:
    bar = f"Loading safetensors checkpoint shards: {100 * done // _SHARDS:3d}% Completed | {done}/{_SHARDS} "
    return Stage(0.15 + 0.5 * done / _SHARDS, _WEIGHTS * done / _SHARDS, _bar(bar + "[00:00<00:00,  4.02it/s]"))


_BEFORE_WEIGHTS = Stage(0.15, 0.00, _log("gpu_model_runner.py:4879", "Starting to load model {model}..."))
STAGES = (
    Stage(0.00, 0.00, _log("model.py:617", "Resolved architecture: Qwen3ForCausalLM")),
    Stage(
        0.05, 0.00, _log("core.py:112", "Initializing a V1 LLM engine (v0.32.0) with config: model='{model}'{parallel}")
    ),
    _BEFORE_WEIGHTS,
    *(_shard(done) for done in range(1, _SHARDS + 1)),
    Stage(0.66, _WEIGHTS, _log("default_loader.py:384", "Loading weights took {weights:.2f} seconds")),
    Stage(
        0.67,
        _WEIGHTS,
        _log("gpu_model_runner.py:4964", "Model loading took {gib:.2f} GiB memory and {weights:.6f} seconds"),
    ),
    Stage(0.69, _WEIGHTS, _log("backends.py:1128", "Dynamo bytecode transform time: {compiling:.2f} s")),
    Stage(
        0.71,
        _WEIGHTS,
        _log("backends.py:391", "Compiling a graph for compile range (1, 8192) takes {compiling:.2f} s"),
    ),
    Stage(0.71, _WEIGHTS, _log("monitor.py:53", "torch.compile took {compiling:.2f} s in total")),
    Stage(0.72, 1.00, _log("kv_cache_utils.py:1711", "GPU KV cache size: 262,144 tokens")),
    Stage(0.80, 1.00, _bar("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|#####     | 34/67")),
    Stage(0.90, 1.00, _bar("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|##########| 67/67")),
    Stage(
        0.92, 1.00, _log("gpu_model_runner.py:6046", "Graph capturing finished in {compiling:.0f} secs, took 0.27 GiB")
    ),
    Stage(
        0.96,
        1.00,
        _log("core.py:306", "init engine (profile, create kv cache, warmup model) took {secs:.2f} seconds"),
    ),
)


async def load(settings: EngineSettings, memory: DeviceMemory, core: int) -> None:
    """Takes `load_secs`, plus `download_secs` for a download; `core` is the pid of the engine core, which prints most
    lines. With the fault never-ready it does not return.

    Raises:
        OutOfMemory: a device is full, or the fault oom-at-load strikes half way.
    """
    clock = asyncio.get_running_loop()
    started = clock.time()
    for stage in STAGES:
        await asyncio.sleep(started + stage.at * settings.load_secs - clock.time())
        if Fault.OOM_AT_LOAD in settings.faults and stage.at >= 0.5:
            raise simulated_out_of_memory(settings, memory)
        memory.change_to(round(settings.vram_mb * stage.memory))
        stage.announce(settings, core)
        if stage is _BEFORE_WEIGHTS and settings.download_secs > 0:
            began = clock.time()
            await _download(settings)
            started += clock.time() - began
        if Fault.NEVER_READY in settings.faults and stage.at >= 0.8:
            await clock.create_future()
    await asyncio.sleep(started + settings.load_secs - clock.time())


async def _download(settings: EngineSettings) -> None:
    """The progress bars of the hub's client, one file after another, and vLLM's summary."""
    for number in range(1, _SHARDS + 1):
        for percent in (0, 25, 50, 75, 100):
            done = f"{_FILE_GB * percent / 100:.2f}G/{_FILE_GB:.2f}G"
            name = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
            bar = "█" * (percent // 10)
            console.raw("EngineCore", f"{name}: {percent:3d}%|{bar:<10}| {done} [00:00<00:00, 171MB/s]")
            await asyncio.sleep(settings.download_secs / _SHARDS / 5)
    text = f"Time spent downloading weights for {settings.model}: {settings.download_secs:.6f} seconds"
    console.log("EngineCore", "weight_utils.py:581", text)


def simulated_out_of_memory(settings: EngineSettings, memory: DeviceMemory) -> OutOfMemory:
    """The fault's error: the first device has less memory left than the next layer needs."""
    total = next(iter(memory.totals_mb.values()), 24564)
    held = next(iter(memory.held_mb.values()), settings.vram_mb // 2 // settings.devices)
    return OutOfMemory(0, max(settings.vram_mb // settings.devices // 4, 1), total, 0, held)


def report_out_of_memory(error: OutOfMemory, core: int) -> int:
    """Prints vLLM's report: the root cause well above the end, within tracebacks of two processes. This and the other
    reports of a failed start return the process's exit status."""
    console.log(
        "EngineCore",
        "core.py:1140",
        "EngineCore failed to start.\n"
        "Traceback (most recent call last):\n"
        '  File "vllm/v1/engine/core.py", line 1114, in run_engine_core\n'
        "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)\n"
        '  File "vllm/v1/worker/gpu_model_runner.py", line 4903, in load_model\n'
        "    self.model = model_loader.load_model(\n"
        '  File "vllm/model_executor/layers/linear.py", line 213, in create_weights\n'
        "    weight = Parameter(torch.empty(sum(output_partition_sizes),\n"
        f"torch.OutOfMemoryError: {error} If reserved but unallocated memory is large try setting "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.",
        level="ERROR",
        pid=core,
    )
    return report_failed_start(1)


def report_lost_part(error: Exception, core: int) -> int:
    """Prints torch's error for a part of a group that did not come or ended, and vLLM's after it."""
    console.log("EngineCore", "core.py:1140", f"torch.distributed.DistNetworkError: {error}", level="ERROR", pid=core)
    return report_failed_start(1)


def report_unsupported_model() -> int:
    """Prints vLLM's error for a model that it does not implement, before anything is loaded."""
    console.raw(
        "APIServer",
        "Traceback (most recent call last):\n"
        '  File "vllm/engine/arg_utils.py", line 1955, in create_model_config\n'
        "    return ModelConfig(\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Model architectures ['NoSuchForCausalLM'] are not supported for now. Supported architectures: "
        "dict_keys(['LlamaForCausalLM', 'Qwen3ForCausalLM']) [type=value_error, input_value=ArgsKwargs((), {}), "
        "input_type=ArgsKwargs]",
    )
    return 1


def report_failed_start(core_status: int) -> int:
    """Prints the server's error when its core exits during the load with `core_status` (negative: a signal)."""
    console.raw(
        "APIServer",
        "Traceback (most recent call last):\n"
        '  File "vllm/entrypoints/cli/serve.py", line 112, in cmd\n'
        "    uvloop.run(run_server(args))\n"
        '  File "vllm/v1/engine/utils.py", line 1139, in wait_for_engine_startup\n'
        "    raise RuntimeError(\n"
        "RuntimeError: Engine core initialization failed. See root cause above. "
        f"Failed core proc(s): {{'EngineCore': {core_status}}}",
    )
    return 1


def report_dead_core() -> None:
    """Prints the server's errors when its core has died."""
    log = functools.partial(console.log, "APIServer", level="ERROR")
    log("core_client.py:605", "Engine core proc EngineCore died unexpectedly, shutting down client.")
    log("async_llm.py:713", "AsyncLLM output_handler failed.")
    console.raw("APIServer", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.")
