"""The simulated device memory of one engine: allocates and frees MiB, or runs out of memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from neuron.gpu import simulated_vram as vram


@dataclass(eq=False)
class OutOfMemory(Exception):
    """A device is full. Sizes in MiB."""

    device: int  # ordinal among the engine's devices
    wanted_mb: int
    total_mb: int
    free_mb: int
    held_mb: int  # by this engine

    def __str__(self) -> str:
        return (
            f"CUDA out of memory. Tried to allocate {self.wanted_mb:.2f} MiB. GPU {self.device} has a total capacity "
            f"of {self.total_mb / 1024:.2f} GiB of which {self.free_mb:.2f} MiB is free. Including non-PyTorch memory, "
            f"this process has {self.held_mb / 1024:.2f} GiB memory in use. Of the allocated memory "
            f"{self.held_mb / 1024:.2f} GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
            "unallocated."
        )


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` split into `parts` whole shares that differ by at most one, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (1 if index < rest else 0) for index in range(parts)]


@dataclass
class DeviceMemory:
    """What an engine holds on its devices, recorded by `neuron.gpu.simulated_vram`; freed when the holder exits.

    `holder` is the pid that holds it: the engine core's. Without a directory (an engine started by hand) nothing is
    recorded and nothing runs out.
    """

    directory: Path | None
    totals_mb: Mapping[str, int]  # by device uuid
    holder: int | None = None  # None: this process
    held_mb: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], *, holder: int | None = None) -> DeviceMemory:
        """Raises ValueError when the variable with the devices is not a JSON object of numbers."""
        directory, devices = environ.get(vram.VRAM_DIR_VARIABLE), environ.get(vram.DEVICES_VARIABLE)
        if not directory or not devices:
            return cls(None, {}, holder)
        return cls(Path(directory), {str(uuid): int(mb) for uuid, mb in dict(json.loads(devices)).items()}, holder)

    def change_to(self, total_mb: int) -> None:
        """Grows or shrinks to `total_mb` on all devices together, in even shares.

        Raises:
            OutOfMemory: a device is full; what was held before stays held.
        """
        if self.directory is None or not self.totals_mb:
            return
        wanted = dict(zip(self.totals_mb, split_evenly(total_mb, len(self.totals_mb)), strict=True))
        # Two engines that load at once must not both get the last free memory.
        with _locked(self.directory):
            used = vram.used_mb(self.directory)
            for index, (uuid, share) in enumerate(wanted.items()):
                held = self.held_mb.get(uuid, 0)
                free = self.totals_mb[uuid] - used[uuid]
                if share - held > max(free, 0):
                    raise OutOfMemory(index, share - held, self.totals_mb[uuid], max(free, 0), held)
            vram.hold(self.directory, wanted, pid=self.holder)
        self.held_mb = wanted


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
