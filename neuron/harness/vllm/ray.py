"""Engines that span hosts with Ray instead of vLLM's own multi-node engine. Pure.

vLLM's executor `ray` needs a Ray cluster that already exists. Each part brings one node, for this engine alone, and
rank 0 runs vLLM as soon as its node is up. `ray_node` is the program that does both.
"""

from __future__ import annotations

import sys
from pathlib import Path, PurePath
from typing import Final

from neuron.harness.base import EngineCommand, LaunchPlan
from neuron.harness.vllm.argument_policy import executor
from neuron.spec import EngineSpec

RAY: Final = "ray"
_PROGRAM = str(Path(__file__).with_name("ray_node.py"))
_MAX_TEMP_DIR_BYTES = 36
"""Ray's sockets are 70 bytes below it, and the path of a socket has at most 107."""


def spans_with_ray(plan: LaunchPlan) -> bool:
    """Whether it is a part of an engine that asks for Ray in its arguments."""
    return plan.spec.group is not None and executor(plan.arguments) == RAY


def with_ray(plan: LaunchPlan, engine: EngineCommand) -> EngineCommand:
    """The command of a part: rank 0 runs `engine`, its command without Ray, beside its node; the others only a node."""
    if not spans_with_ray(plan):
        return engine
    spec, network = plan.spec, plan.network
    assert network is not None
    argv = [sys.executable, "-I", _PROGRAM, "--ray", ray_command(plan), "--address", _address(spec)]
    argv += ["--own-address", network.address, "--gpus", str(spec.device_count)]
    if len(str(plan.tmp_dir).encode()) <= _MAX_TEMP_DIR_BYTES:
        argv += ["--temp-dir", str(plan.tmp_dir)]
    if spec.serves:
        argv += ["--log", str(plan.tmp_dir / "ray.log"), "--", *engine.argv]
    return EngineCommand(tuple(argv), {**engine.env, "RAY_ADDRESS": _address(spec), "RAY_USAGE_STATS_ENABLED": "0"})


def ray_command(plan: LaunchPlan) -> str:
    """The `ray` beside vLLM's executable; that on PATH if vLLM's is found there."""
    executable = PurePath(plan.settings.command[0] if plan.settings.command else "vllm")
    return str(executable.with_name(RAY)) if len(executable.parts) > 1 else RAY


def _address(spec: EngineSpec) -> str:
    assert spec.group is not None
    host = spec.group.master_addr
    return f"{f'[{host}]' if ':' in host else host}:{spec.group.master_port}"
