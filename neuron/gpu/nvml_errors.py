"""The meaning of NVML errors: advice for the operator, and whether a GPU is gone. Pure.

The codes are nvmlReturn_t of nvml.h.
"""

from __future__ import annotations

import pynvml

_UNAVAILABLE = {
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA driver in the kernel and the installed libraries have different versions, as after an update of "
        "the driver: reboot, or stop what uses the GPUs and reload the kernel modules (rmmod nvidia_uvm nvidia_drm "
        "nvidia_modeset nvidia, then modprobe nvidia), then restart neuron"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA libraries are installed but the kernel driver is not loaded: run `modprobe nvidia` and look at "
        "`dmesg` if that fails (Secure Boot, or no module built for this kernel); in a container, pass the GPUs in; "
        "then restart neuron"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "neuron's user has no access to the NVIDIA driver: give it access to /dev/nvidia* (often by the group `video` "
        "or `render`), then restart neuron"
    ),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        "the installed NVIDIA library is too old for nvidia-ml-py: update the driver, then restart neuron"
    ),
}

_LOST = {
    pynvml.NVML_ERROR_GPU_IS_LOST: (
        "the GPU fell off the bus or is otherwise inaccessible: look for `Xid` in `dmesg`, check its power and "
        "seating, and reboot the host"
    ),
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: `nvidia-smi --gpu-reset`, or reboot the host",
    pynvml.NVML_ERROR_INSUFFICIENT_POWER: "the GPU's external power cables are not attached properly",
    pynvml.NVML_ERROR_IRQ_ISSUE: "the kernel has an interrupt issue with the GPU: look at `dmesg`",
    pynvml.NVML_ERROR_NO_PERMISSION: "neuron's user has no access to this GPU: give it access to its /dev/nvidia*",
    pynvml.NVML_ERROR_UNKNOWN: (
        "the driver answers for this GPU with an unknown error: look for `Xid` in `dmesg`; reboot the host if it stays"
    ),
}

# From any call, these mean that the GPU is gone. An unknown error means that only for a figure that every GPU has: WSL
# and virtual GPUs return it for optional figures.
_GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND})

# The driver or device lacks the figure; nothing is wrong.
_UNSUPPORTED = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
    }
)


def unavailable_reason(error: pynvml.NVMLError) -> str:
    """Why no GPU can be used after `error` at NVML's start, and what to do about it."""
    advice = _UNAVAILABLE.get(error.value, "see `nvidia-smi` and `dmesg`, then restart neuron")
    return f"NVML: {error} ({error.value}): {advice}"


def lost_reason(error: pynvml.NVMLError) -> str:
    """Why one GPU cannot be used, and what to do about it."""
    advice = _LOST.get(error.value, "see `nvidia-smi` and `dmesg`")
    return f"NVML: {error} ({error.value}): {advice}"


def means_gone(error: pynvml.NVMLError) -> bool:
    """True for errors that mean, from any call, that the GPU is gone."""
    return error.value in _GONE


def means_unsupported(error: pynvml.NVMLError) -> bool:
    """True for errors that only mean that a figure does not exist."""
    return error.value in _UNSUPPORTED
