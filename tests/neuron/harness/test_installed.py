"""What neuron learns of an engine's installation, from files and real processes."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from neuron.config import HarnessSettings
from neuron.harness.base import InstalledEngine, LaunchFacts, LaunchPlan
from neuron.harness.checks import CheckedConfig
from neuron.harness.installed import RETRY_SECS, InstalledEngines
from neuron.harness.registry import HARNESSES, harness_of
from neuron.spec import EngineSpec
from shared.protocol import Device
from tests.neuron.neurons import Neuron, marked_processes, until

VLLM = HARNESSES["vllm"]
SPEC = EngineSpec(model_id="org/model", harness="vllm", source="org/model")
GPU = Device(index=3, name="A", vram_total_mb=32000, uuid="GPU-a")
SLICE = Device(index=8, name="A", vram_total_mb=8000, uuid="MIG-b", kind="mig", parent=0)
FACTS = LaunchFacts(has_gpu=True, cpus=(0,), environ={}, vram_dir=Path("/v"))
PLAN = LaunchPlan(SPEC, HarnessSettings(sleep_mode=True), (GPU,), "h", 1, Path("/t"), "k", "i/1", control_key="c")


def script(path: Path, body: str, interpreter: str = "/bin/sh") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def install(prefix: Path, number: str, **files: str) -> None:
    """vLLM in a Python environment: its metadata and these files of its package."""
    packages = prefix / "lib" / "python3.12" / "site-packages"
    (packages / f"vllm-{number}.dist-info").mkdir(parents=True)
    (packages / "vllm_other-9.9.dist-info").mkdir()
    (packages / "vllm" / "engine").mkdir(parents=True)
    for name, text in files.items():
        (packages / "vllm" / "engine" / f"{name}.py").write_text(text, encoding="utf-8")


async def asked(executable: Path, engines: InstalledEngines | None = None) -> InstalledEngine:
    own = engines or InstalledEngines()
    try:
        return await own.of(VLLM, HarnessSettings(command=[str(executable)]), dict(os.environ))
    finally:
        if engines is None:
            await own.close()


@pytest.mark.parametrize("way", ["beside", "linked", "first line"])
async def test_the_version_is_in_the_metadata(tmp_path: Path, way: str) -> None:
    """Nothing is started: the executable of this test would leave a file."""
    install(tmp_path / "venv", "0.22.1+cu130", arg_utils='"--max-model-len"; gpu_memory_utilization')
    executable = script(tmp_path / "venv" / "bin" / "vllm", f"touch {tmp_path}/ran")
    if way == "linked":
        (tmp_path / "bin").mkdir()
        executable = tmp_path / "bin" / "vllm"
        executable.symlink_to(tmp_path / "venv" / "bin" / "vllm")
    if way == "first line":
        executable = script(tmp_path / "bin" / "vllm", "", f"{tmp_path}/venv/bin/python")
    found = await asked(executable)
    assert found.version == "0.22.1+cu130"
    assert found.lacks("enable_sleep_mode", beside="gpu_memory_utilization")
    assert not found.lacks("log_error_stack", beside="middleware")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("0.22.1+cpu", "0.22.1+cpu"),
        ("INFO 11-29 19:20:11 [__init__.py:36] No platform detected\n0.22.1", "0.22.1"),
        ("version: 4567 (abc0123)\nbuilt with GNU 11.4.0 for Linux x86_64", "4567"),
        ("version: 0.1.0-dev (build 1, commit 7e4c0a9)", "0.1.0-dev"),
        ("text-embeddings-router 1.8.2", "1.8.2"),
        ("ollama version is 0.5.1", "0.5.1"),
        ("usage: serve MODEL", None),
    ],
)
async def test_without_metadata_the_executable_is_asked(tmp_path: Path, printed: str, number: str | None) -> None:
    """Once, and again after it has changed."""
    count = tmp_path / "count"
    count.touch()
    body = f'test "$1" = --version && echo >> {count} && cat <<END\n{printed}\nEND'
    executable = script(tmp_path / "bin" / "vllm", body)
    engines = InstalledEngines()

    async def known_after(times: int) -> bool:
        """A busy machine may need longer for its answer than a load waits."""
        found = await asked(executable, engines)
        return found.version == number and count.read_text() == "\n" * times

    await until(lambda: known_after(1))
    assert await known_after(1)
    os.utime(executable, ns=(1, 1))
    await until(lambda: known_after(2))
    await engines.close()


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("version: 0.3.0-dev (build 10621, commit c1d0e7a00)\nbuilt with GNU 11.4.0 for Linux x86_64", "10621"),
        ("version: 0.1.0-dev (build 1, commit 7e4c0a9)\nbuilt with GNU 11.4.0 for Linux x86_64", "0.1.0-dev"),
        ("version: 10360 (90e6a9131)", "10360"),
    ],
)
async def test_llama_cpp_tells_its_build(tmp_path: Path, printed: str, number: str) -> None:
    """Without one, as in a build that was made outside of its repository, its version."""
    config = CheckedConfig.model_validate({"harness": {"llama": {"preset": "llama.cpp"}}})
    harness = harness_of("llama", config)
    executable = script(tmp_path / "bin" / "llama-server", f"cat <<END\n{printed}\nEND")
    settings = config.harness_settings("llama").model_copy(update={"command": [str(executable)]})
    engines = InstalledEngines()

    async def known() -> bool:
        return (await engines.of(harness, settings, dict(os.environ))).version == number

    await until(known)
    await engines.close()


@pytest.mark.parametrize("failure", ["status", "cannot be started"])
async def test_it_is_asked_again_after_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    """A minute later, without a change of the file: the fault may have been the host's."""
    count, good, now = tmp_path / "count", tmp_path / "good", [0.0]
    count.touch()
    body = f"echo >> {count}; test -e {good} || exit 1; echo 0.30.0"
    interpreter = "/bin/sh" if failure == "status" else str(tmp_path / "sh")
    executable = script(tmp_path / "bin" / "vllm", body, interpreter)
    engines = InstalledEngines(lambda: now[0])
    with caplog.at_level("INFO"):
        assert (await asked(executable, engines)).version is None
        await until(lambda: "does not tell its version" in caplog.text)
    good.touch()
    if failure != "status":
        (tmp_path / "sh").symlink_to("/bin/sh")
    now[0] += RETRY_SECS - 1
    asked_before = count.read_text()
    assert (await asked(executable, engines)).version is None
    assert count.read_text() == asked_before
    now[0] += 1

    async def known() -> bool:
        return (await asked(executable, engines)).version == "0.30.0"

    await until(known)
    await engines.close()


async def test_a_slow_executable_delays_no_load(mark: str, tmp_path: Path) -> None:
    """The load goes on without its answer, and a later load has it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    executable = script(tmp_path / "bin" / "vllm", f"read line < {gate}; echo 0.30.0")
    engines = InstalledEngines()
    assert (await asked(executable, engines)).version is None
    gate.write_text("go\n")

    async def answered() -> bool:
        return (await asked(executable, engines)).version == "0.30.0"

    await until(answered)
    await engines.close()


async def test_nothing_is_left_of_an_executable_that_does_not_answer(mark: str, tmp_path: Path) -> None:
    executable = script(tmp_path / "bin" / "vllm", "sleep 1000 & wait")
    engines = InstalledEngines()
    assert (await asked(executable, engines)).version is None
    await until(lambda: marked_processes(mark))
    await engines.close()
    await until(lambda: not marked_processes(mark))


async def test_missing_executables_have_no_version(tmp_path: Path) -> None:
    assert await asked(tmp_path / "nothing") == InstalledEngine()


@pytest.mark.parametrize(
    ("number", "named"),
    [
        ("0.22.1", "3,MIG-b"),
        ("0.9", "3,MIG-b"),
        ("0.23.0rc1", "GPU-a,MIG-b"),
        ("1.0", "GPU-a,MIG-b"),
        (None, "GPU-a,MIG-b"),
    ],
)
def test_vllm_gets_the_ids_that_it_understands(number: str | None, named: str) -> None:
    """vLLM 0.22 and older crash on the UUID of a GPU."""
    plan = replace(PLAN, devices=(GPU, SLICE), installed=InstalledEngine(number))
    env = VLLM.command(plan, FACTS).env
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == (named, "PCI_BUS_ID")


@pytest.mark.parametrize(
    ("words", "quiet", "sleeps"),
    [
        ([], True, True),
        ([{"middleware"}, {"gpu_memory_utilization", "enable_sleep_mode"}], False, True),
        ([{"middleware", "log_error_stack"}, {"gpu_memory_utilization"}], True, False),
    ],
)
def test_vllm_gets_no_flag_that_it_lacks(words: list[set[str]], quiet: bool, sleeps: bool) -> None:
    """neuron's own flags: an unknown one would end the engine."""
    plan = replace(PLAN, installed=InstalledEngine("0.9.0", tuple(map(frozenset, words))))
    argv = VLLM.command(plan, FACTS).argv
    assert VLLM.can_sleep(plan, FACTS) == sleeps
    assert ("--enable-sleep-mode" in argv) == sleeps
    assert ("--no-log-error-stack" in argv) == (quiet and sleeps)


async def test_the_version_is_shown(neuron: Neuron) -> None:
    """The simulation is part of this package, and runs with this Python."""
    assert (await neuron.load("org/model")).status == 200
    assert (await neuron.model("org/model"))["engine_version"] == version("cortex-neuron")
