"""How a vLLM is started so that it can sleep, and only its neuron can put it to sleep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from neuron.harness.base import LaunchFacts, LaunchPlan
from neuron.harness.sleep import SleepControl
from neuron.harness.vllm import guard
from neuron.harness.vllm.argument_policy import has_flag
from neuron.harness.vllm.control import sleep_routes
from neuron.harness.vllm.control.lora import UPDATING
from neuron.harness.vllm.errors import weights_mb
from neuron.harness.vllm.guard.neuron_guard import DIGEST_VARIABLE, digest_of

DEV_MODE_VARIABLE = "VLLM_SERVER_DEV_MODE"
_GUARD_ARGUMENTS = ("--middleware", "neuron_guard.Guard")
# Development mode logs a traceback for each refused request, which would hide the cause of a failure.
_QUIET = "--no-log-error-stack"
_GUARD_DIRECTORY = str(Path(guard.__file__).parent)


class VllmSleep(SleepControl):
    """Level 1 keeps the weights in the host's memory and discards the KV cache."""

    async def sleep(self, http: aiohttp.ClientSession, url: str, control_key: str, *, level: int) -> None:
        await sleep_routes.sleep(http, url, control_key, level=level)

    async def wake(self, http: aiohttp.ClientSession, url: str, control_key: str) -> None:
        await sleep_routes.wake(http, url, control_key)

    async def is_sleeping(self, http: aiohttp.ClientSession, url: str, control_key: str) -> bool | None:
        return await sleep_routes.is_sleeping(http, url, control_key)

    async def is_guarded(self, http: aiohttp.ClientSession, url: str, control_key: str) -> bool:
        return await sleep_routes.is_guarded(http, url, control_key)

    def weights_mb(self, lines: Sequence[str], ranks: int) -> int | None:
        return weights_mb(lines, ranks)


def vllm_can_sleep(plan: LaunchPlan, facts: LaunchFacts) -> bool:
    """True when a vLLM of this plan is started with sleep mode.

    vLLM refuses `--enable-sleep-mode` without a GPU, and on the CPU nothing would be freed, since its weights are in
    RAM already: there only `sleep_mode = "dev"` works, which accepts requests to sleep and frees no memory. A model
    with `--no-enable-sleep-mode` among its arguments never sleeps.
    """
    mode = plan.settings.sleep_mode
    if plan.installed.lacks("enable_sleep_mode", beside="gpu_memory_utilization"):
        return False
    return _may_sleep(plan) and (mode == "dev" or (mode is True and facts.has_gpu and plan.ram_mb is None))


def sim_can_sleep(plan: LaunchPlan) -> bool:
    """The same for the simulation, where sleep mode is on by default."""
    return _may_sleep(plan) and plan.ram_mb is None and plan.settings.sleep_mode is not False


def _may_sleep(plan: LaunchPlan) -> bool:
    # A part of a group cannot: the neurons of the other parts would not learn that their memory is free.
    may = plan.spec.group is None and plan.control_key is not None
    return may and not has_flag(plan.arguments, "--no-enable-sleep-mode")


def guard_arguments() -> list[str]:
    """Arguments that load the guard.

    They come before an operator's own `--middleware`: vLLM wraps each one around those before it, so the guard sees the
    same path as the routes.
    """
    return list(_GUARD_ARGUMENTS)


def sleep_arguments(plan: LaunchPlan, facts: LaunchFacts) -> list[str]:
    """Those of a vLLM that can sleep, besides the guard's."""
    pool = facts.has_gpu and not has_flag(plan.arguments, "--enable-sleep-mode")
    quiet = not plan.installed.lacks("log_error_stack", beside="middleware")
    return [*([_QUIET] if quiet else []), *(["--enable-sleep-mode"] if pool else [])]


def control_environment(plan: LaunchPlan, *, sleeps: bool) -> dict[str, str]:
    """The digest by which the guard recognises the key, and what opens the routes that it guards: development mode for
    an engine that `sleeps`, and the loading of adapters. Must not be overridden. Empty if there is nothing to guard."""
    opened = {**({DEV_MODE_VARIABLE: "1"} if sleeps else {}), **(UPDATING if plan.spec.max_loras else {})}
    if plan.control_key is None or not opened:
        return {}
    return {**opened, DIGEST_VARIABLE: digest_of(plan.control_key)}


def guarded_environment(plan: LaunchPlan, facts: LaunchFacts, *, sleeps: bool) -> dict[str, str]:
    """The same with what a real vLLM needs to find the guard. An existing PYTHONPATH follows the guard's."""
    opened = control_environment(plan, sleeps=sleeps)
    if not opened:
        return {}
    path = plan.settings.env.get("PYTHONPATH") or facts.environ.get("PYTHONPATH")
    return {
        **opened,
        "PYTHONPATH": first_on_path(_GUARD_DIRECTORY, path),
        # The Rust server does not support --middleware.
        "VLLM_USE_RUST_FRONTEND": "0",
    }


def first_on_path(directory: str, path: str | None) -> str:
    """A PYTHONPATH that starts with `directory`. (An empty part would mean the working directory.)"""
    return directory + os.pathsep + path if path else directory
