"""What an engine needs so that it can sleep, and so that nobody but its neuron can tell it to."""

from __future__ import annotations

import os
from pathlib import Path

from neuron.harness.base import HostFacts, LaunchPlan
from neuron.harness.vllm import guard
from neuron.harness.vllm.argument_policy import gives
from neuron.harness.vllm.guard.neuron_guard import DIGEST_VARIABLE, digest_of

DEV_MODE_VARIABLE = "VLLM_SERVER_DEV_MODE"
# Development mode logs a traceback for every request that is refused: an engine's log would be full of errors that are
# none of its own, and its cause of death would be looked for among them.
_GUARD_ARGUMENTS = ("--middleware", "neuron_guard.Guard", "--no-log-error-stack")
_GUARD_DIRECTORY = str(Path(guard.__file__).parent)


def vllm_can_sleep(plan: LaunchPlan, facts: HostFacts) -> bool:
    """True when a vLLM of this plan is started so that it can sleep.

    vLLM refuses `--enable-sleep-mode` where there is no GPU: then only `sleep_mode = "dev"` counts, with which it plays
    along and frees nothing. A model whose arguments have `--no-enable-sleep-mode` is left out.
    """
    mode = plan.settings.sleep_mode
    return _may_sleep(plan) and (mode == "dev" or (mode is True and facts.has_gpu))


def sim_can_sleep(plan: LaunchPlan) -> bool:
    """As above, and unless it is switched off: it costs nothing there."""
    return _may_sleep(plan) and plan.settings.sleep_mode is not False


def _may_sleep(plan: LaunchPlan) -> bool:
    return plan.control_key is not None and not gives(plan.arguments, "--no-enable-sleep-mode")


def sleep_arguments(plan: LaunchPlan, facts: HostFacts) -> list[str]:
    """Arguments of a vLLM that can sleep.

    The guard comes before an operator's own `--middleware`: vLLM puts each around those before it, so the guard sees
    the path as the routes do.
    """
    pool = facts.has_gpu and not gives(plan.arguments, "--enable-sleep-mode")
    return [*_GUARD_ARGUMENTS, *(["--enable-sleep-mode"] if pool else [])]


def control_environment(control_key: str) -> dict[str, str]:
    """Development mode, and what the guard knows the key by. Must not be overridden."""
    return {DEV_MODE_VARIABLE: "1", DIGEST_VARIABLE: digest_of(control_key)}


def guarded_environment(plan: LaunchPlan, facts: HostFacts, control_key: str) -> dict[str, str]:
    """The environment of a vLLM that can sleep, on top of everything else; any PYTHONPATH is kept behind the guard."""
    path = plan.settings.env.get("PYTHONPATH") or facts.environ.get("PYTHONPATH")
    return {
        **control_environment(control_key),
        "PYTHONPATH": first_on_path(_GUARD_DIRECTORY, path),
        # Another server than the one that knows --middleware, in a binary of its own.
        "VLLM_USE_RUST_FRONTEND": "0",
    }


def first_on_path(directory: str, path: str | None) -> str:
    """A PYTHONPATH with `directory` in front. (An empty one would mean the working directory.)"""
    return directory + os.pathsep + path if path else directory
