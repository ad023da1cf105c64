"""A real vLLM without a neuron, started with the command line and environment that neuron's harness builds."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from neuron.config import HarnessSettings
from neuron.harness.base import LaunchFacts, LaunchPlan
from neuron.harness.environment import inheritable
from neuron.harness.registry import HARNESSES
from neuron.spec import EngineSpec
from shared.protocol import Device
from tests.ports import free_port
from tests.processes import eventually, of_session

MODEL, API_KEY, CONTROL_KEY = "test/tiny", "an api key", "the control key of the tests"


@dataclass(frozen=True)
class RunningEngine:
    """A healthy engine."""

    url: str
    log: Path
    pid: int

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def running_engine(
    directory: Path, model: Path, settings: HarnessSettings, *, devices: tuple[Device, ...] = ()
) -> Iterator[RunningEngine]:
    """Loads a model on these devices or on the CPU. Afterwards no process of its session is left."""
    port = free_port()
    plan = LaunchPlan(
        spec=EngineSpec(model_id=MODEL, harness="vllm", source=str(model), args=("--max-model-len", "512")),
        settings=settings,
        devices=devices,
        host="127.0.0.1",
        port=port,
        tmp_dir=directory,
        api_key=API_KEY,
        engine_id="tests/1",
        control_key=CONTROL_KEY,
    )
    facts = LaunchFacts(
        has_gpu=bool(devices),
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        environ=inheritable(os.environ),
        vram_dir=directory,
    )
    assert HARNESSES["vllm"].can_sleep(plan, facts)
    command = HARNESSES["vllm"].command(plan, facts)
    log = directory / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv,
            env=dict(command.env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    engine = RunningEngine(f"http://127.0.0.1:{port}", log, process.pid)

    def healthy() -> bool:
        assert process.poll() is None, engine.text()[-4000:]
        try:
            with urllib.request.urlopen(f"{engine.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        eventually(healthy, "the engine is healthy", within_secs=240)
        yield engine
    finally:
        for member in {process.pid, *(member.pid for member in of_session(process.pid))}:
            os.kill(member, signal.SIGKILL)
        process.wait()
        eventually(lambda: not of_session(process.pid), "the engine's processes end", within_secs=10)
