"""What an engine inherits from neuron's environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from neuron.harness.base import ENGINE_ID_VARIABLE, LaunchPlan

_OWN_PREFIXES = ("NEURON_", "CORTEX_")
# systemd's: an engine that reported readiness or used the socket or watchdog would act as neuron.
_SUPERVISOR = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
"""How many threads the usual libraries start."""
_PER_ENGINE = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TMPDIR"})


def inheritable(environ: Mapping[str, str], *, secrets: frozenset[str] = frozenset()) -> dict[str, str]:
    """`environ` without neuron's and cortex's own variables, the supervisor's, and those named in `secrets`."""
    dropped = _SUPERVISOR | _PER_ENGINE | secrets
    return {k: v for k, v in environ.items() if k not in dropped and not k.startswith(_OWN_PREFIXES)}


def engine_environment(
    plan: LaunchPlan, inherited: Mapping[str, str], own: Mapping[str, str], fixed: Mapping[str, str]
) -> dict[str, str]:
    """In order of precedence, lowest first: inherited, the limits on threads, the harness's `own`, the operator's
    `env`, the harness's `fixed`, and neuron's own variables."""
    return {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        **thread_limits(plan),
        **own,
        **plan.settings.env,
        **fixed,
        "TMPDIR": str(plan.tmp_dir),
        ENGINE_ID_VARIABLE: plan.engine_id,
    }


def thread_limits(plan: LaunchPlan) -> dict[str, str]:
    """For an engine on the CPU that gets only some of the host's cores: those of each of its ranks."""
    each = max(1, len(plan.cores) // plan.spec.device_count)
    return dict.fromkeys(_THREADS, str(each)) if plan.cores else {}
