"""Whether a GPU is fit for use, from the driver's events and flags: what takes it out of use, what is only reported,
and what ends a fault. Pure.

Xid numbers and what to do about each: NVIDIA's "Xid Errors" (docs.nvidia.com/deploy/xid-errors). Recovery actions and
clock reasons: nvml.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pynvml

RESET_ADVICE = (
    "reset it (stop neuron, which holds the driver open, run `nvidia-smi --gpu-reset`, start neuron) or reboot the host"
)
"""What to do about a fault."""

FATAL_XIDS = {
    46: "the GPU stopped processing",
    48: "uncorrectable memory error (double-bit ECC)",
    62: "internal microcontroller halted",
    64: "a memory row could not be remapped or retired",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncorrectable memory error, not contained",
    110: "security fault",
    119: "the GPU's system processor (GSP) does not answer",
    120: "error of the GPU's system processor (GSP)",
    136: "NVLink training failed",
    140: "unrecovered memory error (ECC)",
    143: "the GPU could not be initialised",
    158: "fatal timeout of the GPU",
    167: "fatal timeout on the PCIe bus",
}
"""After these nothing is placed on the GPU until it has been reset. All others are of the program that used the GPU
(13, 31, 43, 45, 109 and more), or only worth a warning."""

REPORTED_XIDS = {
    63: "a memory row is marked for remapping",
    92: "many correctable memory errors",
    94: "uncorrectable memory error, contained: it ended its program, and the GPU should be reset when convenient",
}
"""The GPU works on. After 94 the page with the error is out of use and other programs may start (NVIDIA's "GPU Memory
Error Management"); if the driver still wants a reset, its recovery action says so."""

_ACTIONS = {
    pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "the driver says that the GPU needs a reset",
    pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "the driver says that the host must be rebooted",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "the driver says that the GPU must be drained and reset",
    pynvml.NVML_GPU_RECOVERY_ACTION_BUS_RESET: "the driver says that the GPU needs a reset of its bus",
    pynvml.NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT: "the driver says that the host must be rebooted",
}

_THERMAL = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
_SLOWDOWNS = (
    (_THERMAL, "slowed down because it is too hot"),
    (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "slowed down by the power supply (power brake)"),
)


@dataclass(frozen=True)
class GpuCondition:
    """What the driver says of one GPU now; None where it has no such figure.

    `recovery_action`: NVML_GPU_RECOVERY_ACTION_*. `energy_mj`: used since the driver initialised the GPU, so it falls
    only with a reset or a reload. `ecc_uncorrected`: memory errors since then. `remap_pending`, `remap_failed`: rows of
    its memory. `clock_reasons`: bits of nvmlClocksEventReason*.
    """

    recovery_action: int | None = None
    energy_mj: int | None = None
    ecc_uncorrected: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    clock_reasons: int = 0


HEALTHY = GpuCondition()


@dataclass(frozen=True)
class XidRecord:
    """The Xids of one GPU since it was last reset. `fatal` is the first fatal one. `energy_mj` is the highest figure
    seen since; `needed_action`: the driver asked for a recovery action; `gone`: the GPU was gone."""

    fatal: int | None = None
    reported: frozenset[int] = frozenset()
    energy_mj: int | None = None
    needed_action: bool = False
    gone: bool = False


NO_XIDS = XidRecord()


def with_xid(record: XidRecord, xid: int) -> XidRecord:
    """The record after another Xid."""
    if xid in FATAL_XIDS:
        return record if record.fatal is not None else replace(record, fatal=xid)
    return replace(record, reported=record.reported | {xid}) if xid in REPORTED_XIDS else record


def after_going(record: XidRecord) -> XidRecord:
    """The record of a GPU that is gone, as the driver says."""
    return replace(record, gone=True) if record.fatal is not None else record


def after_reading(record: XidRecord, condition: GpuCondition) -> XidRecord:
    """The record after another reading; empty once the GPU has been reset.

    A reset shows in one of three ways: the driver no longer asks for the action that it asked for; the counter of used
    energy starts again; the GPU answers again after the driver said that it was gone.
    """
    if record == NO_XIDS:
        return record
    needs_action = condition.recovery_action in _ACTIONS
    acted = record.needed_action and condition.recovery_action == pynvml.NVML_GPU_RECOVERY_ACTION_NONE
    before, now = record.energy_mj, condition.energy_mj
    restarted = before is not None and now is not None and now < before
    if acted or restarted or (record.gone and not needs_action):
        return NO_XIDS
    return replace(
        record,
        energy_mj=before if now is None else now,
        needed_action=record.needed_action or needs_action,
        gone=False,
    )


def fault_of(record: XidRecord, condition: GpuCondition) -> str | None:
    """Why nothing may be placed on the GPU; None if it is fit for use."""
    if record.fatal is not None:
        return f"Xid {record.fatal}: {FATAL_XIDS[record.fatal]}"
    return _ACTIONS.get(condition.recovery_action or 0)


def warnings_of(record: XidRecord, condition: GpuCondition) -> list[str]:
    """What an operator should know of a GPU that is still used."""
    found = [f"Xid {xid}: {REPORTED_XIDS[xid]}" for xid in sorted(record.reported)]
    if condition.remap_failed:
        found.append("remapping of a memory row failed: the GPU should be replaced")
    if condition.remap_pending:
        found.append("remapping of a memory row is pending: it takes effect when the GPU is reset")
    if condition.ecc_uncorrected:
        errors = "error" if condition.ecc_uncorrected == 1 else "errors"
        found.append(f"{condition.ecc_uncorrected} uncorrectable memory {errors} (ECC) since the last reset")
    if condition.recovery_action == pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P:
        found.append("the driver says that traffic between GPUs must end before this one recovers")
    return [*found, *(text for bits, text in _SLOWDOWNS if condition.clock_reasons & bits)]
