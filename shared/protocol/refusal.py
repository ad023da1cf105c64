"""Machine-readable details of a failed load."""

from __future__ import annotations

from enum import Enum

from shared.protocol.base import Mib, WireModel


class FailureCause(str, Enum):
    """What caused a failed load. On the wire a plain string; an unknown or missing one means `unknown`."""

    NODE = "node"  # this host: another one may load the model
    MODEL = "model"  # the model, its files or its arguments: it would fail anywhere
    UNKNOWN = "unknown"


class DeviceFigures(WireModel):
    """One device in the error `insufficient_vram`, in MiB; `unusable`: why the device cannot be used,
    `needed_mb`: what the load needs on it."""

    index: int
    total_mb: Mib = 0
    booked_mb: Mib = 0
    foreign_mb: Mib = 0
    bookable_mb: Mib = 0
    unusable: str | None = None
    needed_mb: Mib | None = None
