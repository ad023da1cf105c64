"""The simulated engine: a real process with vLLM's command line, HTTP surface and output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import neuron
from neuron.config import HarnessSettings
from neuron.gpu.simulated_vram import DEFAULT_DEVICE_VRAM_MB, DEVICES_VARIABLE, RAM_NAME, VRAM_DIR_VARIABLE
from neuron.harness.base import EarlyImports, EngineCommand, LaunchFacts, LaunchPlan
from neuron.harness.vllm.argument_policy import flag_value, has_flag
from neuron.harness.vllm.command import VllmHarness, context_arguments, serve_arguments, vllm_environment
from neuron.harness.vllm.control.lora import lora_arguments
from neuron.harness.vllm.early_imports import LATE_VARIABLES
from neuron.harness.vllm.ray import with_ray
from neuron.harness.vllm.sleep_mode import VllmSleep, control_environment, first_on_path, sim_can_sleep
from neuron.harness.vllm.tools import family_of
from neuron.memory.requirement import MemoryRequirement
from neuron.spec import EngineSpec

DEFAULT_COMMAND = (sys.executable, "-m", "neuron.sim")
_PACKAGE_ROOT = str(Path(neuron.__file__).parent.parent)


# Its start takes too little time to be worth a process.
_IMPORTS = EarlyImports(
    ("neuron.sim.process.lifecycle", "neuron.sim.engine.arguments"),
    LATE_VARIABLES | {DEVICES_VARIABLE},
    automatic=False,
)


class SimSleep(VllmSleep):
    """Has no weights, so sleep takes no host memory."""

    weights_in_ram = False


class SimHarness(VllmHarness):
    """Takes simulated memory, answers with random words, and is supervised like vLLM otherwise."""

    runs_on_gpu = False
    sizes_itself = False
    sleep = SimSleep()
    python_package = "cortex-neuron"
    option_files = ()
    version_arguments = ()

    def program(self, settings: HarnessSettings) -> tuple[str, ...]:
        return tuple(settings.command or DEFAULT_COMMAND)

    def early_imports(self, env: Mapping[str, str]) -> EarlyImports:
        return _IMPORTS

    def memory_requirement(self, spec: EngineSpec, share_mb: int | None, args: Sequence[str]) -> MemoryRequirement:
        """`--vram-mb` over all devices, else `share_mb`, else the simulation's default."""
        total = flag_value(args, "--vram-mb")
        if total is not None and total.isdecimal():
            return MemoryRequirement(-(-int(total) // spec.device_count))
        return MemoryRequirement(DEFAULT_DEVICE_VRAM_MB if share_mb is None else share_mb)

    def tool_arguments(self, names: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
        """vLLM's for a family that neuron knows; the simulation calls tools without them."""
        family = family_of(names)
        return () if family is None or family.tool is None else super().tool_arguments(names, args)

    def command(self, plan: LaunchPlan, facts: LaunchFacts) -> EngineCommand:
        argv = serve_arguments(plan, DEFAULT_COMMAND)
        total = plan.spec.vram_mb
        if total is None and plan.share_mb is not None:
            total = plan.share_mb * plan.spec.device_count
        if total is not None and not has_flag(plan.arguments, "--vram-mb"):
            argv += ["--vram-mb", str(total)]
        devices = {device.uuid: device.vram_total_mb for device in plan.devices if device.uuid is not None}
        if plan.ram_mb is not None:
            devices = {RAM_NAME: facts.ram_total_mb or plan.ram_mb}
        own = {
            VRAM_DIR_VARIABLE: str(facts.vram_dir),
            DEVICES_VARIABLE: json.dumps(devices),
            # This package, installed or not, wherever neuron was started from.
            "PYTHONPATH": first_on_path(_PACKAGE_ROOT, facts.environ.get("PYTHONPATH")),
        }
        fixed = control_environment(plan, sleeps=sim_can_sleep(plan))
        argv += lora_arguments(plan.spec)
        argv += [*plan.arguments, *context_arguments(plan.spec)]
        return with_ray(plan, EngineCommand(tuple(argv), vllm_environment(plan, facts, own, fixed)))

    def can_sleep(self, plan: LaunchPlan, facts: LaunchFacts) -> bool:
        return sim_can_sleep(plan)
