"""The host memory that sleeping engines and spare processes take: how much is available, and whether more fits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import psutil

from neuron import errors as failures
from neuron.config import NeuronConfig


@dataclass(frozen=True)
class HostMemory:
    """MiB. `available_mb` is what programs can allocate without swapping, now that some is taken; `reserve_mb` of
    it stays free."""

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


async def check_sleep(
    config: NeuronConfig,
    model_id: str,
    *,
    sleeps_in_ram: bool,
    weights_mb: int | None,
    vram_used_mb: int | None,
    taken_mb: int = 0,
) -> int:
    """MiB of this host's memory that an engine will take when it sleeps. `taken_mb` is what sleeping engines and
    spare processes take already.

    Raises:
        Conflict: `insufficient_ram`.
    """
    if not sleeps_in_ram and config.simulate is None:
        return 0  # a simulated engine, and no simulated memory
    wanted_mb = needed_mb(weights_mb, vram_used_mb)
    memory = await host_memory(config, taken_mb=taken_mb)
    if memory is not None:
        memory.check_fits(model_id, wanted_mb)
    return wanted_mb


async def host_memory(config: NeuronConfig, *, taken_mb: int) -> HostMemory | None:
    """This host's memory now. On a simulated host, where sleep moves no memory, it is `ram_mb` less `taken_mb`, or None
    when `ram_mb` is not set."""
    reserve_mb = config.sleep.ram_reserve_mb
    if config.simulate is None:
        available = (await asyncio.to_thread(psutil.virtual_memory)).available
        return HostMemory(available // 2**20, reserve_mb)
    if config.simulate.ram_mb is None:
        return None
    return HostMemory(config.simulate.ram_mb - taken_mb, reserve_mb)


@dataclass
class SleepBudget:
    """MiB by booking number. Hold `lock` while an engine falls asleep, so that two cannot count on the same memory."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _taken: dict[int, int] = field(default_factory=dict)

    @property
    def taken_mb(self) -> int:
        return sum(self._taken.values())

    def take(self, number: int, mb: int) -> None:
        self._taken[number] = mb

    def release(self, number: int) -> None:
        """The engine is awake, or ended."""
        self._taken.pop(number, None)
