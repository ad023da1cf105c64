"""The simulated engine: a real process with vLLM's command line, HTTP surface and output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import neuron
from neuron.config import HarnessName
from neuron.harness import vllm_log
from neuron.harness.base import EngineCommand, HostFacts, LaunchPlan
from neuron.harness.environment import engine_environment
from neuron.harness.sleep_mode import control_environment, first_on_path, sim_can_sleep
from neuron.harness.vllm import serve_arguments
from neuron.owned_flags import gives
from neuron.sim.vram import DEVICES_VARIABLE, VRAM_DIR_VARIABLE
from shared.protocol import Progress

DEFAULT_COMMAND = (sys.executable, "-m", "neuron.sim")
_PACKAGE_ROOT = str(Path(neuron.__file__).parent.parent)


class SimHarness:
    """Takes simulated memory, answers with made-up words, and is otherwise supervised like the real thing."""

    name: HarnessName = "sim"
    health_path = "/health"
    runs_on_gpu = False
    sleeps_in_ram = False

    def command(self, plan: LaunchPlan, facts: HostFacts) -> EngineCommand:
        argv = serve_arguments(plan, DEFAULT_COMMAND)
        if plan.spec.vram_mb is not None and not gives(plan.arguments, "--vram-mb"):
            argv += ["--vram-mb", str(plan.spec.vram_mb)]
        devices = {device.uuid: device.vram_total_mb for device in plan.devices if device.uuid is not None}
        own = {
            VRAM_DIR_VARIABLE: str(facts.vram_dir),
            DEVICES_VARIABLE: json.dumps(devices),
            # This very package, also when it was not installed and wherever neuron was started from.
            "PYTHONPATH": first_on_path(_PACKAGE_ROOT, facts.environ.get("PYTHONPATH")),
        }
        binding: dict[str, str] = {}
        if plan.control_key is not None and sim_can_sleep(plan):
            binding = control_environment(plan.control_key)
        return EngineCommand((*argv, *plan.arguments), engine_environment(plan, facts.environ, own, binding))

    def can_sleep(self, plan: LaunchPlan, facts: HostFacts) -> bool:
        return sim_can_sleep(plan)

    def progress_of(self, line: str) -> Progress | None:
        return vllm_log.progress_of(line)

    def root_cause(self, lines: Sequence[str]) -> str | None:
        return vllm_log.root_cause(lines)

    def weights_mb(self, lines: Sequence[str], ranks: int) -> int | None:
        return vllm_log.weights_mb(lines, ranks)
