"""The memory of this host that sleeping engines take: how much there is, and whether one more has room in it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil

from neuron import errors as failures
from neuron.config import NeuronConfig


@dataclass(frozen=True)
class HostRam:
    """MiB. `available_mb` is what programs can have without swapping, what sleeps already not counted in it;
    `promised_mb` is what engines that are falling asleep right now are about to take of it."""

    available_mb: int
    reserve_mb: int
    promised_mb: int = 0

    def check_room(self, model_id: str, needed_mb: int) -> None:
        """Nothing, when the weights of one more engine have room beside what is kept free.

        Raises:
            Conflict: `insufficient_ram`, with the figures.
        """
        left_mb = self.available_mb - self.promised_mb
        if needed_mb > left_mb - self.reserve_mb:
            raise failures.insufficient_ram(model_id, needed_mb, max(left_mb, 0), self.reserve_mb)


def needed_mb(weights_mb: int | None, vram_used_mb: int | None) -> int:
    """MiB of host memory that an engine needs for its sleep at level 1: its weights, as its log told them, else all
    that it holds, which is more (the KV cache is discarded)."""
    known = [mb for mb in (weights_mb, vram_used_mb) if mb is not None]
    return min(known, default=0)


def slept_mb(weights_mb: int | None, before_mb: int | None, after_mb: int | None) -> int:
    """MiB of host memory that a sleeping engine takes: its weights, and no more than what it gave up on its devices."""
    return needed_mb(weights_mb, max((before_mb or 0) - (after_mb or 0), 0))


async def check_sleep(
    config: NeuronConfig,
    model_id: str,
    *,
    sleeps_in_ram: bool,
    weights_mb: int | None,
    vram_used_mb: int | None,
    slept_mb: int = 0,
    promised_mb: int = 0,
) -> int:
    """MiB of this host's memory that an engine is going to take when it sleeps. `slept_mb` is what all take that sleep
    already, `promised_mb` what those need that are falling asleep.

    Raises:
        Conflict: `insufficient_ram`, there is no room for it.
    """
    if not sleeps_in_ram and config.simulate is None:
        return 0  # a simulated engine, and no simulated memory
    wanted_mb = needed_mb(weights_mb, vram_used_mb)
    ram = await host_ram(config, slept_mb=slept_mb, promised_mb=promised_mb)
    if ram is not None:
        ram.check_room(model_id, wanted_mb)
    return wanted_mb


async def host_ram(config: NeuronConfig, *, slept_mb: int, promised_mb: int = 0) -> HostRam | None:
    """This host's memory now; on a simulated host its `ram_mb` without the `slept_mb` of all that sleep, or None
    when it has no limit there (nothing really moves)."""
    reserve_mb = config.sleep.ram_reserve_mb
    if config.simulate is None:
        memory = await asyncio.to_thread(psutil.virtual_memory)
        return HostRam(memory.available // 2**20, reserve_mb, promised_mb)
    if config.simulate.ram_mb is None:
        return None
    return HostRam(config.simulate.ram_mb - slept_mb, reserve_mb, promised_mb)
