"""The result of an estimate. Sizes in MiB, rounded up. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.protocol import Parallelism

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Line:
    """One item: on each device and on all together. None: unknown, and not in the total."""

    what: str
    device_mb: int | None
    total_mb: int | None
    how: str


@dataclass(frozen=True)
class Option:
    """The model with tensor groups of `tensor_parallel` devices. `reason`: why that is impossible or too large; None:
    it fits."""

    tensor_parallel: int
    device_mb: int
    possible: bool
    reason: str | None

    @property
    def fits(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Estimate:
    """The lines are for the devices of `parallel`, those of each option for the same stages and copies. `basis` names
    the source of the weights' sizes."""

    source: str
    architecture: str
    basis: str
    max_model_len: int  # tokens
    sequences: int  # of that length, at once
    parallel: Parallelism
    host_devices: int  # that can be used
    lines: tuple[Line, ...]
    options: tuple[Option, ...]  # from 1 on without a gap
    notes: tuple[str, ...] = ()

    @property
    def split_over(self) -> int:
        """The number of devices."""
        return self.parallel.devices

    @property
    def total_mb(self) -> int:
        """All devices together, without unknown items."""
        return sum(line.total_mb or 0 for line in self.lines)

    @property
    def tensor_parallel(self) -> int | None:
        """The smallest tensor-parallel size with which the model fits on this host's devices; None when it does not
        fit."""
        return next((option.tensor_parallel for option in self.options if option.fits), None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each other number of devices does not work, and the notes."""
        refused = (
            f"over {option.tensor_parallel}, {option.device_mb} MiB on each: {option.reason}"
            for option in self.options
            if option.reason
        )
        return (*refused, *self.notes)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Items that are missing in the total."""
        return tuple(line.what for line in self.lines if line.total_mb is None)

    def per_device_mb(self, tensor_parallel: int) -> int:
        """On each device with this tensor-parallel size.

        Raises:
            ValueError: fewer than 1, or more than the estimate looked at.
        """
        if not 1 <= tensor_parallel <= len(self.options):
            raise ValueError(f"{tensor_parallel} devices: estimated for 1 to {len(self.options)}")
        return self.options[tensor_parallel - 1].device_mb


def line_of(what: str, device_bytes: float, devices: int, how: str) -> Line:
    return Line(what, math.ceil(device_bytes / MIB), math.ceil(device_bytes * devices / MIB), how)


def unknown_line(what: str) -> Line:
    subject, _, rest = what.partition(": ")
    return Line(subject, None, None, f"not counted: {rest}" if rest else "not counted")
