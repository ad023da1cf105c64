"""The host memory that sleeping engines and spare processes take, and whether more fits. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from neuron import errors as failures


@dataclass(frozen=True)
class HostMemory:
    """MiB. `available_mb` is what programs can allocate without swapping, without what is promised to engines;
    `reserve_mb` of it stays free."""

    available_mb: int
    reserve_mb: int

    def has_room(self, mb: int) -> bool:
        """True if `mb` more can be taken without touching the reserve."""
        return mb <= self.available_mb - self.reserve_mb

    def check_fits(self, model_id: str, needed_mb: int) -> None:
        """Checks that the weights of one more engine fit.

        Raises:
            Conflict: `insufficient_ram`, with the figures.
        """
        if not self.has_room(needed_mb):
            raise failures.insufficient_ram(model_id, needed_mb, max(self.available_mb, 0), self.reserve_mb)


def needed_mb(weights_mb: int | None, vram_used_mb: int | None) -> int:
    """MiB of host memory that an engine needs to sleep at level 1: its weights, if its log says how large they are,
    else all that it holds, which is more (the KV cache is discarded)."""
    known = [mb for mb in (weights_mb, vram_used_mb) if mb is not None]
    return min(known, default=0)


def slept_mb(weights_mb: int | None, before_mb: int | None, after_mb: int | None) -> int:
    """MiB of host memory that a sleeping engine takes: its weights, at most what it released on its devices."""
    return needed_mb(weights_mb, max((before_mb or 0) - (after_mb or 0), 0))
