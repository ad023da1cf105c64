"""What an engine inherits from neuron's environment."""

from __future__ import annotations

from collections.abc import Mapping

from neuron.harness.base import ENGINE_ID_VARIABLE, LaunchPlan

_OWN_PREFIXES = ("NEURON_", "CORTEX_")
# systemd's: an engine that told its own readiness, or took our socket or watchdog, would speak for neuron.
_SUPERVISOR = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
)
# Set for each engine, so that an inherited value would at best be wrong. (VLLM_PORT is for vLLM's internal ports:
# shared by all engines it would make them collide. Development mode opens routes to everybody who reaches an engine:
# who wants that says so in `env`.)
_PER_ENGINE = frozenset(
    {"VLLM_API_KEY", "VLLM_PORT", "VLLM_SERVER_DEV_MODE", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TMPDIR"}
)


def inheritable(environ: Mapping[str, str], *, secrets: frozenset[str] = frozenset()) -> dict[str, str]:
    """`environ` without neuron's and cortex's own variables, the supervisor's, and those named in `secrets`."""
    dropped = _SUPERVISOR | _PER_ENGINE | secrets
    return {k: v for k, v in environ.items() if k not in dropped and not k.startswith(_OWN_PREFIXES)}


def engine_environment(
    plan: LaunchPlan, inherited: Mapping[str, str], own: Mapping[str, str], binding: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Inherited, the harness's `own`, the operator's, and last what must not be overridden: `binding` and neuron's."""
    return {
        **inherited,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        **own,
        **plan.settings.env,
        **(binding or {}),
        "VLLM_API_KEY": plan.api_key,
        "TMPDIR": str(plan.tmp_dir),
        # vLLM's processes overwrite their environment when they set their title, unless this is set: then the
        # engine's id stays readable in /proc/PID/environ of each.
        "SPT_NOENV": "1",
        ENGINE_ID_VARIABLE: plan.engine_id,
    }
