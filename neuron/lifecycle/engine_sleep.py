"""An engine falls asleep and wakes up: the engine told, its memory on the devices and in the host accounted for."""

from __future__ import annotations

import asyncio

from neuron import errors as failures
from neuron.engine.engine import Engine
from neuron.harness.sleep import SleepControl
from neuron.lifecycle.launcher import Launcher
from neuron.memory import host_memory as host_ram

_LOG_LINES = 2000  # of a load, in which the size of the weights is looked for


async def fall_asleep(launcher: Launcher, engine: Engine, level: int) -> None:
    """Returns when the engine sleeps, and others may have its memory.

    Raises:
        Conflict: it cannot sleep, has requests, or this host has no memory for its weights; it goes on as before.
        SleepFailed: as `SleepControl.sleep`. WakeFailed: it neither sleeps nor serves.
    """
    control = _control_of(engine)
    async with launcher.sleepers.turn:
        await launcher.measure([engine])
        before_mb = engine.vram_used_mb
        lines = await engine.output.tail(_LOG_LINES)
        weights_mb = control.weights_mb(lines, engine.spec.tensor_parallel)
        await host_ram.check_sleep(
            launcher.config,
            engine.spec.model_id,
            sleeps_in_ram=control.weights_in_ram,
            weights_mb=weights_mb,
            vram_used_mb=before_mb,
            slept_mb=launcher.sleepers.taken_mb,
        )
        await control.sleep(launcher.http, engine.url, engine.control_key, level=level)
        held = await launcher.held_by(engine)
        engine.slept_mb = host_ram.slept_mb(weights_mb, before_mb, engine.vram_used_mb)
        launcher.sleepers.asleep(engine.placement.number, engine.slept_mb)
        launcher.ledger.shrink(engine.placement.number, held)
    await launcher.note(engine)


async def found_asleep(launcher: Launcher, engine: Engine) -> bool:
    """True for an engine, started by an earlier neuron, that sleeps; then it is accounted for."""
    control = engine.harness.sleep
    if control is None or not engine.can_sleep:
        return False
    if not await control.is_sleeping(launcher.http, engine.url, engine.control_key):
        return False
    placement = engine.placement
    launcher.sleepers.asleep(placement.number, engine.slept_mb)
    awake_mb = dict(zip(placement.indices, placement.booked_mb, strict=False))
    launcher.ledger.shrink(placement.number, await launcher.held_by(engine), awake_mb=awake_mb)
    return True


async def wake_up(launcher: Launcher, engine: Engine) -> None:
    """Returns when the engine serves again.

    Raises:
        InsufficientVram: its memory was given away meanwhile; it sleeps on.
        WakeFailed: it has to be ended.
    """
    control, number = _control_of(engine), engine.placement.number
    async with launcher.turns.turn(engine.devices):
        await launcher.measure_all()
        topology, health = await asyncio.gather(launcher.source.discover(), launcher.source.health())
        launcher.ledger.regrow(number, topology, health)
        engine.waking = True
        await launcher.admission.until_memory_is_back(number)
        await control.wake(launcher.http, engine.url, engine.control_key)
        engine.waking = False
        engine.slept_mb = 0
        launcher.sleepers.gone(number)
        await launcher.measure([engine])
    await launcher.note(engine)


def _control_of(engine: Engine) -> SleepControl:
    """Raises Conflict: `sleep_unsupported`."""
    if engine.harness.sleep is None or not engine.can_sleep:
        why = "it was started without sleep mode, which this host or its configuration does not offer"
        raise failures.sleep_unsupported(engine.spec.model_id, why)
    return engine.harness.sleep
