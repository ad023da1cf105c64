"""What the error of a load says beside its message, for a program that has to decide what to do next."""

from __future__ import annotations

from enum import Enum

from shared.protocol.base import Mib, WireModel


class FailureCause(str, Enum):
    """Whose doing a failed load is. On the wire a plain string; one that is not here, or none, is as `unknown`."""

    NODE = "node"  # this host's: another may well load the model
    MODEL = "model"  # the model's, its files' or its arguments': it would fail anywhere
    UNKNOWN = "unknown"


class DeviceFigures(WireModel):
    """One device in the error `insufficient_vram`, in MiB; `unusable` says why nothing can be placed there,
    `needed_mb` what the load wants of it."""

    index: int
    total_mb: Mib = 0
    booked_mb: Mib = 0
    foreign_mb: Mib = 0
    bookable_mb: Mib = 0
    unusable: str | None = None
    needed_mb: Mib | None = None
