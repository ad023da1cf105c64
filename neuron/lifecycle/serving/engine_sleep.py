"""Puts engines to sleep and wakes them, and accounts for their memory on the devices and in the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import aiohttp

from neuron import errors as failures
from neuron.config import NeuronConfig
from neuron.engine.engine import Engine
from neuron.harness.sleep import SleepControl
from neuron.lifecycle.engine_memory import EngineMemory
from neuron.lifecycle.spare.spares import Spares
from neuron.memory import host_memory
from shared.errors import Conflict

_LOG_LINES = 2000  # searched for the size of the weights


class EngineSleep:
    """Sleep and wake of the engines of this host."""

    def __init__(self, config: NeuronConfig, memory: EngineMemory, http: aiohttp.ClientSession, spares: Spares) -> None:
        self._config = config
        self._memory = memory
        self._http = http
        self._spares = spares

    async def fall_asleep(self, engine: Engine, level: int) -> None:
        """Returns when the engine sleeps and its device memory can be booked by others.

        Raises:
            Conflict: it cannot sleep, has requests, or the host has not enough memory for its weights; it keeps
            serving. SleepFailed: as `SleepControl.sleep`. WakeFailed: it neither sleeps nor serves.
        """
        control, memory, number = _control_of(engine), self._memory, engine.placement.number
        async with memory.sleep_lock, self._spares.paused():
            await memory.measure([engine])
            before_mb = engine.vram_used_mb
            lines = await engine.output.tail(_LOG_LINES)
            weights_mb = control.weights_mb(lines, engine.spec.device_count)
            try:
                await self._check_host_memory(engine, control, weights_mb)
            except Conflict:
                if not await self._spares.drop_automatic():
                    raise
                await self._check_host_memory(engine, control, weights_mb)
            await control.sleep(self._http, engine.url, engine.control_key, level=level)
            held = await memory.held_by(engine)
            engine.fell_asleep(host_memory.slept_mb(weights_mb, before_mb, engine.vram_used_mb))
            memory.ledger.shrink_to_sleep(number, held, slept_mb=engine.slept_mb)
        await engine.save_record()

    async def _check_host_memory(self, engine: Engine, control: SleepControl, weights_mb: int | None) -> None:
        """Raises Conflict: the host has not enough memory for the engine's weights."""
        if not control.weights_in_ram and self._config.simulate is None:
            return  # a simulated engine, and no simulated memory
        memory = await self._memory.host_memory(taken_mb=self._spares.memory_mb)
        if memory is not None:
            memory.check_fits(str(engine.spec.key), host_memory.needed_mb(weights_mb, engine.vram_used_mb))

    async def found_asleep(self, engine: Engine) -> bool:
        """True for an adopted engine that sleeps; its memory is accounted for then."""
        control, memory, placement = engine.harness.sleep, self._memory, engine.placement
        if control is None or not engine.can_sleep:
            return False
        if not await control.is_sleeping(self._http, engine.url, engine.control_key):
            return False
        awake_mb = dict(zip(placement.indices, placement.booked_mb, strict=False))
        held = await memory.held_by(engine)
        memory.ledger.shrink_to_sleep(placement.number, held, awake_mb=awake_mb, slept_mb=engine.slept_mb)
        return True

    async def wake_up(self, engine: Engine, waiting: Callable[[Sequence[str]], None]) -> None:
        """Returns when the engine serves again. `waiting`: as `EngineMemory.until_available`.

        Raises:
            InsufficientVram: its device memory is booked by others now; it keeps sleeping.
            WakeFailed: it must be stopped.
        """
        control, memory, number = _control_of(engine), self._memory, engine.placement.number
        async with memory.start_locks.held(engine.devices):
            reading = await memory.read()
            memory.ledger.book_wake(number, reading.topology, reading.health)
            engine.begin_to_wake()
            await memory.until_available(number, waiting)
            await control.wake(self._http, engine.url, engine.control_key)
            engine.woke()
            await memory.measure([engine])
        await engine.save_record()

    async def check_guard(self, engine: Engine) -> None:
        """Sets `can_sleep` to whether the engine's sleep routes work and are closed to others.

        Raises:
            GuardFailed: its development routes are open without a key.
        """
        if engine.harness.sleep is not None and engine.can_sleep:
            engine.can_sleep = await engine.harness.sleep.is_guarded(self._http, engine.url, engine.control_key)


def _control_of(engine: Engine) -> SleepControl:
    """Raises Conflict: `sleep_unsupported`."""
    if engine.harness.sleep is None or not engine.can_sleep:
        if engine.spec.group is not None:
            raise failures.sleep_unsupported(str(engine.spec.key), "it spans several neurons")
        why = "it was started without sleep mode, which this host or its configuration does not offer"
        raise failures.sleep_unsupported(str(engine.spec.key), why)
    return engine.harness.sleep
