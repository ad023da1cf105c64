"""Command lines and environments of the harnesses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from neuron.config import HarnessSettings
from neuron.harness.base import EngineCommand, LaunchFacts, LaunchPlan
from neuron.harness.environment import inheritable
from neuron.harness.registry import HARNESSES
from neuron.harness.vllm.command import cpu_binding
from neuron.harness.vllm.guard import neuron_guard
from neuron.harness.vllm.guard.neuron_guard import DIGEST_VARIABLE, digest_of
from neuron.memory.requirement import MemoryRequirement
from neuron.spec import EngineSpec
from shared.protocol import Device

GPUS = (
    Device(index=0, name="A", vram_total_mb=32000, uuid="GPU-a"),
    Device(index=1, name="B", vram_total_mb=24000, uuid="GPU-b"),
)
SPEC = EngineSpec(model_id="org/model", harness="vllm", source="org/model")
ENVIRON = {"PATH": "/bin", "HF_TOKEN": "hf", "HOME": "/root"}


def command(
    spec: EngineSpec, *, has_gpu: bool = True, settings: HarnessSettings | None = None, **facts: Any
) -> EngineCommand:
    return HARNESSES[spec.harness].command(*planned(spec, has_gpu=has_gpu, settings=settings, **facts))


def planned(
    spec: EngineSpec,
    *,
    has_gpu: bool = True,
    settings: HarnessSettings | None = None,
    control_key: str | None = None,
    environ: dict[str, str] = ENVIRON,
) -> tuple[LaunchPlan, LaunchFacts]:
    plan = LaunchPlan(
        spec=spec,
        settings=settings or HarnessSettings(),
        devices=GPUS[: spec.device_count],
        host="127.0.0.1",
        port=20001,
        tmp_dir=Path("/state/engines/1/tmp"),
        api_key="key",
        engine_id="instance/1",
        share_mb=spec.share_mb,
        control_key=control_key,
    )
    return plan, LaunchFacts(has_gpu=has_gpu, cpus=(0, 1, 2, 3), environ=environ, vram_dir=Path("/state/vram"))


def test_vllm_in_full() -> None:
    """Every field of a spec, in order: neuron's arguments, the spec's, the operator's."""
    spec = replace(
        SPEC,
        source="/models/m",
        quant="fp8",
        tensor_parallel=2,
        vram_mb=30000,
        served_names=("alias",),
        args=("--a", "1"),
    )
    made = command(spec, settings=HarnessSettings(command=["/venv/bin/vllm"], extra_args=["--b"]))
    assert list(made.argv) == [
        *("/venv/bin/vllm", "serve", "/models/m", "--served-model-name", "org/model", "alias"),
        *("--host", "127.0.0.1", "--port", "20001", "--tensor-parallel-size", "2", "--quantization", "fp8"),
        *("--gpu-memory-utilization", "0.6250"),  # 15000 of the smaller card's 24000
        *("--a", "1", "--b"),
    ]
    assert made.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_vllm_in_short() -> None:
    """Missing fields are left to vLLM."""
    assert list(command(SPEC).argv) == [
        *("vllm", "serve", "org/model", "--served-model-name", "org/model", "--host", "127.0.0.1", "--port", "20001")
    ]


@pytest.mark.parametrize(
    "flag", ["--gpu-memory-utilization=0.5", "--gpu_memory_utilization", "--kv-cache-memory-bytes"]
)
def test_memory_already_sized(flag: str) -> None:
    """neuron does not contradict arguments that size the memory, of the spec or the operator."""
    spec = replace(SPEC, vram_mb=8000)
    for made in (
        command(replace(spec, args=(flag, "1"))),
        command(spec, settings=HarnessSettings(extra_args=[flag, "1"])),
    ):
        assert made.argv.count("--gpu-memory-utilization") == (flag == "--gpu-memory-utilization")


@pytest.mark.parametrize(("vram_mb", "share"), [(8000, "0.2500"), (10667, "0.3333"), (1, "0.0001"), (32000, "1.0000")])
def test_memory_share(vram_mb: int, share: str) -> None:
    """Never rounded up: shares that add up to a device fit on it."""
    assert command(replace(SPEC, vram_mb=vram_mb)).argv[-2:] == ("--gpu-memory-utilization", share)


@pytest.mark.parametrize("total", [12288, 24564, 32607, 81559, 143771])
def test_engines_that_share_a_device_fit_on_it(total: int) -> None:
    """However a device is divided between two engines, their fractions do not exceed their shares."""
    device = Device(index=0, vram_total_mb=total)
    for share in range(1000, total, 997):
        taken = 0.0
        for mb in (share, total - share):
            plan = LaunchPlan(SPEC, HarnessSettings(), (device,), "h", 1, Path("/t"), "k", "i/1", share_mb=mb)
            fraction = float(serve_memory(plan))
            assert mb - total / 10_000 <= fraction * total + 1e-6 <= mb + 2e-6
            taken += fraction
        assert taken <= 1 + 1e-9


def serve_memory(plan: LaunchPlan) -> str:
    facts = LaunchFacts(has_gpu=True, cpus=(0,), environ={}, vram_dir=Path("/v"))
    argv = HARNESSES["vllm"].command(plan, facts).argv
    return argv[argv.index("--gpu-memory-utilization") + 1]


def test_estimated_share() -> None:
    """An estimated booking is passed to the engine, and to the simulation."""
    facts = LaunchFacts(has_gpu=True, cpus=(0,), environ={}, vram_dir=Path("/v"))
    two = replace(SPEC, tensor_parallel=2)
    plan = LaunchPlan(two, HarnessSettings(), GPUS, "h", 1, Path("/t"), "k", "i/1", share_mb=6000)
    assert serve_memory(plan) == "0.2500"
    simulated = replace(plan, spec=replace(two, harness="sim"))
    assert HARNESSES["sim"].command(simulated, facts).argv[-2:] == ("--vram-mb", "12000")


@pytest.mark.parametrize(
    ("harness", "share", "args", "need"),
    [
        ("vllm", 8000, (), MemoryRequirement(8000, one_fraction=True)),
        ("vllm", None, (), MemoryRequirement(fraction=0.92)),
        ("vllm", 8000, ("--gpu-memory-utilization", "0.5"), MemoryRequirement(fraction=0.5)),
        (
            "vllm",
            None,
            ("--gpu_memory_utilization=0.5", "--device-memory-utilization=0.4"),
            MemoryRequirement(fraction=0.4),
        ),
        ("vllm", None, ("--gpu-memory-utilization", "much"), MemoryRequirement(fraction=0.92)),
        ("vllm", None, ("--gpu-memory-utilization", "7"), MemoryRequirement(fraction=0.92)),
        ("vllm", 8000, ("--kv-cache-memory-bytes", "1G"), MemoryRequirement(8000)),
        ("vllm", None, ("--kv-cache-memory-bytes", "1G"), MemoryRequirement(fraction=0.92)),
        ("sim", 8000, (), MemoryRequirement(8000)),
        ("sim", None, (), MemoryRequirement(1024)),
        ("sim", 8000, ("--vram-mb", "3001"), MemoryRequirement(1501)),
        ("sim", 8000, ("--vram-mb=3000", "--vram-mb"), MemoryRequirement(8000)),
    ],
)
def test_memory_requirement(harness: str, share: int | None, args: tuple[str, ...], need: MemoryRequirement) -> None:
    """The requirement comes from the engine's arguments, else its share, else its default."""
    spec = replace(SPEC, tensor_parallel=2)
    assert HARNESSES[harness].memory_requirement(spec, share, args) == need


def test_without_gpus() -> None:
    """Each rank gets its own cores; simulated GPUs are named like real ones."""
    made = command(replace(SPEC, tensor_parallel=2, vram_mb=8000), has_gpu=False)
    assert made.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1|2-3"
    own = HarnessSettings(env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    assert (
        command(replace(SPEC, tensor_parallel=2), has_gpu=False, settings=own).env["VLLM_CPU_OMP_THREADS_BIND"]
        == "nobind"
    )


@pytest.mark.parametrize(
    ("ranks", "cpus", "bound"),
    [
        (1, (0, 1), None),
        (2, (0, 1), "0|1"),
        (2, (7, 1, 3, 2), "1-2|3,7"),
        (2, (0, 1, 2, 3, 4), "0-1|2-3"),
        (4, (0, 1), None),
    ],
)
def test_cpu_binding(ranks: int, cpus: tuple[int, ...], bound: str | None) -> None:
    """Equal shares of the allowed cores; left to vLLM for one rank and with too few cores."""
    assert cpu_binding(ranks, cpus).get("VLLM_CPU_OMP_THREADS_BIND") == bound


@pytest.mark.parametrize("harness", ["vllm", "sim"])
def test_environment(harness: str) -> None:
    """The key is in the environment and not in argv; the operator cannot override neuron's variables."""
    spec = replace(SPEC, harness=harness)
    made = command(spec, settings=HarnessSettings(env={"X": "1", "VLLM_API_KEY": "mine", "TMPDIR": "/tmp"}))
    assert made.env["VLLM_API_KEY"] == "key"
    assert "key" not in made.argv
    assert made.env["TMPDIR"] == "/state/engines/1/tmp"
    assert made.env["NEURON_ENGINE_ID"] == "instance/1"
    assert (made.env["SPT_NOENV"], made.env["VLLM_NO_USAGE_STATS"], made.env["DO_NOT_TRACK"]) == ("1", "1", "1")
    assert (made.env["X"], made.env["HF_TOKEN"]) == ("1", "hf")


@pytest.mark.parametrize("harness", ["vllm", "sim"])
@pytest.mark.parametrize(
    ("environ", "env", "expected"),
    [(None, None, 75), ("9", None, 9), ("9", "30", 30), (None, "-1", 0), (None, "soon", None)],
)
def test_how_long_idle_connections_are_kept(
    harness: str, environ: str | None, env: str | None, expected: float | None
) -> None:
    """Longer than by default, unless the operator says otherwise; cortex learns what the engine is told."""
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    settings = HarnessSettings(env={} if env is None else {name: env})
    inherited = ENVIRON if environ is None else {**ENVIRON, name: environ}
    made = command(replace(SPEC, harness=harness), settings=settings, environ=inherited)
    assert HARNESSES[harness].keep_alive_secs(made.env) == expected


def test_neurons_variables_are_not_inherited() -> None:
    """The engine gets neither neuron's token, under any name, nor its supervisor's sockets, nor another engine's
    key."""
    environ = {
        **ENVIRON,
        **dict.fromkeys(
            ("NEURON_TOKEN", "CORTEX_API_KEY", "BEAST_TOKEN", "NOTIFY_SOCKET", "LISTEN_FDS", "VLLM_API_KEY"), "x"
        ),
    }
    inherited = inheritable(environ, secrets=frozenset({"BEAST_TOKEN"}))
    assert inherited == {**ENVIRON, "VLLM_API_KEY": "x"}
    made = command(SPEC, environ={**inherited, "VLLM_PORT": "1", "VLLM_SERVER_DEV_MODE": "1"})
    assert made.env["VLLM_API_KEY"] == "key"
    assert made.env.keys().isdisjoint({"VLLM_PORT", "VLLM_SERVER_DEV_MODE"})


GUARD = str(Path(neuron_guard.__file__).parent)


@pytest.mark.parametrize(
    ("mode", "has_gpu", "args", "sleeps"),
    [
        (None, True, (), False),
        (False, True, (), False),
        (True, True, (), True),
        (True, False, (), False),
        ("dev", True, (), True),
        ("dev", False, (), True),
        (True, True, ("--no-enable-sleep-mode",), False),
        (True, True, ("--enable_sleep_mode", "--middleware", "own.Middleware"), True),
    ],
)
def test_vllm_with_sleep_mode(
    mode: bool | Literal["dev"] | None, has_gpu: bool, args: tuple[str, ...], sleeps: bool
) -> None:
    """If configured and supported: the flag, which fails without a GPU, and development mode behind the guard, which
    comes before an operator's own middleware."""
    plan, facts = planned(
        replace(SPEC, args=args),
        has_gpu=has_gpu,
        settings=HarnessSettings(sleep_mode=mode, extra_args=["--x"]),
        control_key="control",
    )
    harness = HARNESSES["vllm"]
    made = harness.command(plan, facts)
    assert harness.can_sleep(plan, facts) is sleeps
    assert ("VLLM_SERVER_DEV_MODE" in made.env) is (DIGEST_VARIABLE in made.env) is ("PYTHONPATH" in made.env) is sleeps
    given = ["--middleware", "neuron_guard.Guard", "--no-log-error-stack"] if sleeps else []
    given += ["--enable-sleep-mode"] if sleeps and has_gpu and "--enable_sleep_mode" not in args else []
    assert list(made.argv)[9:] == [*given, *args, "--x"]


def test_the_guard_cannot_be_overridden() -> None:
    """The engine gets the digest of the key, never the key, and finds the guard before any module of that name."""
    own = {"VLLM_SERVER_DEV_MODE": "0", "PYTHONPATH": "/own", DIGEST_VARIABLE: "x", "VLLM_USE_RUST_FRONTEND": "1"}
    settings = HarnessSettings(sleep_mode=True, env=own)
    made = command(SPEC, settings=settings, control_key="control", environ={**ENVIRON, "PYTHONPATH": "/inherited"})
    assert (made.env["VLLM_SERVER_DEV_MODE"], made.env[DIGEST_VARIABLE]) == ("1", digest_of("control"))
    assert (made.env["PYTHONPATH"], made.env["VLLM_USE_RUST_FRONTEND"]) == (f"{GUARD}:/own", "0")
    assert "control" not in [*made.argv, *made.env.values()]
    inherited = command(
        SPEC,
        settings=HarnessSettings(sleep_mode=True),
        control_key="control",
        environ={**ENVIRON, "PYTHONPATH": "/inherited"},
    )
    assert inherited.env["PYTHONPATH"] == f"{GUARD}:/inherited"


def test_without_a_control_key_nothing_sleeps() -> None:
    for name, harness in HARNESSES.items():
        plan, facts = planned(replace(SPEC, harness=name), settings=HarnessSettings(sleep_mode="dev"))
        assert not harness.can_sleep(plan, facts)
        assert "VLLM_SERVER_DEV_MODE" not in harness.command(plan, facts).env


@pytest.mark.parametrize(("mode", "sleeps"), [(None, True), (True, True), ("dev", True), (False, False)])
def test_sim_with_sleep_mode(mode: bool | Literal["dev"] | None, sleeps: bool) -> None:
    """Sleep mode is on by default, since it costs nothing; the command line is the same."""
    spec = replace(SPEC, harness="sim")
    plan, facts = planned(spec, settings=HarnessSettings(sleep_mode=mode), control_key="control", has_gpu=False)
    made = HARNESSES["sim"].command(plan, facts)
    assert HARNESSES["sim"].can_sleep(plan, facts) is sleeps
    assert (made.env.get("VLLM_SERVER_DEV_MODE") == "1") is (made.env.get(DIGEST_VARIABLE) is not None) is sleeps
    assert made.argv == command(spec, has_gpu=False).argv
    kept_out, _ = planned(
        replace(spec, args=("--no-enable-sleep-mode",)),
        settings=HarnessSettings(sleep_mode=mode),
        control_key="control",
    )
    assert not HARNESSES["sim"].can_sleep(kept_out, facts)


def test_sim() -> None:
    """The simulation gets vLLM's command line, and the devices with the simulated memory."""
    made = command(
        replace(SPEC, harness="sim", tensor_parallel=2, vram_mb=5000, args=("--load-secs", "1")), has_gpu=False
    )
    assert list(made.argv) == [
        *(sys.executable, "-m", "neuron.sim", "serve", "org/model", "--served-model-name", "org/model"),
        *("--host", "127.0.0.1", "--port", "20001", "--tensor-parallel-size", "2", "--vram-mb", "5000"),
        *("--load-secs", "1"),
    ]
    assert json.loads(made.env["NEURON_SIM_DEVICES"]) == {"GPU-a": 32000, "GPU-b": 24000}
    assert made.env["NEURON_SIM_VRAM_DIR"] == "/state/vram"


@pytest.mark.parametrize(
    ("split", "flags"),
    [
        ({"pipeline_parallel": 2}, "--pipeline-parallel-size 2"),
        ({"data_parallel": 3, "expert_parallel": True}, "--data-parallel-size 3 --enable-expert-parallel"),
        (
            {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2},
            "--tensor-parallel-size 2 --pipeline-parallel-size 2 --data-parallel-size 2",
        ),
        ({"expert_parallel": True, "tensor_parallel": 2}, "--tensor-parallel-size 2 --enable-expert-parallel"),
    ],
)
@pytest.mark.parametrize("harness", ["vllm", "sim"])
def test_parallel_flags(split: dict[str, Any], flags: str, harness: str) -> None:
    """Only what is more than one is a flag; the simulated engine accepts the same."""
    made = command(replace(SPEC, harness=harness, **split), has_gpu=False)
    start = made.argv.index("20001") + 1
    assert list(made.argv[start : start + len(flags.split())]) == flags.split()
    assert not any("parallel" in word for word in made.argv[start + len(flags.split()) :])


def test_cores_for_every_rank() -> None:
    """On a CPU host each rank of each copy has cores of its own, in the order of the ranks."""
    made = command(replace(SPEC, tensor_parallel=2, data_parallel=2), has_gpu=False)
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0|1|2|3"


def test_share_is_of_every_rank() -> None:
    """`vram_mb` is the sum of all ranks, copies included."""
    spec = replace(SPEC, vram_mb=32000, pipeline_parallel=2)
    assert spec.share_mb == 16000
    assert command(spec).argv[-2:] == ("--gpu-memory-utilization", "0.6666")
    assert replace(SPEC, vram_mb=80000, tensor_parallel=2, pipeline_parallel=2, data_parallel=2).share_mb == 10000
