"""What an engine inherits from neuron's environment. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from neuron.harness.base import ENGINE_ID_VARIABLE, LaunchFacts, LaunchPlan
from shared.protocol import Device
from shared.protocol.topology import AMD, NVIDIA

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


DeviceIds = Literal["uuid", "index"]

NO_DEVICES: Final[Mapping[str, str]] = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
"""Hides the GPUs of either vendor. HIP takes an empty value as none at all."""
# HIP numbers only what these leave visible, and neuron numbers every GPU.
_HIP_FILTERS = ("ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def device_ids(devices: Sequence[Device], by: DeviceIds = "uuid") -> list[str]:
    """What an engine can address the devices by. HIP and the harnesses of other accelerators take numbers only; a MIG
    instance has no number in CUDA."""
    return [
        device.uuid
        if device.uuid is not None and device.vendor == NVIDIA and (by == "uuid" or device.is_mig_instance)
        else str(device.index)
        for device in devices
    ]


def device_variables(devices: Sequence[Device], facts: LaunchFacts, by: DeviceIds = "uuid") -> dict[str, str]:
    """The variables that show an engine these devices, at least one, and no others. For devices of an unknown vendor
    the one that neuron.toml names, if any."""
    ids = ",".join(device_ids(devices, by))
    vendors = {device.vendor for device in devices}
    if vendors == {NVIDIA}:
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ids}
    variable = "HIP_VISIBLE_DEVICES" if vendors == {AMD} else facts.device_variable
    return {} if variable is None else {variable: ids}


def engine_environment(
    plan: LaunchPlan, inherited: Mapping[str, str], own: Mapping[str, str], fixed: Mapping[str, str]
) -> dict[str, str]:
    """In order of precedence, lowest first: inherited, the limits on threads, the harness's `own`, the operator's
    `env`, the harness's `fixed`, and neuron's own variables."""
    filters = _HIP_FILTERS if any(device.vendor == AMD for device in plan.devices) else ()
    return {
        **{name: value for name, value in inherited.items() if name not in filters},
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
