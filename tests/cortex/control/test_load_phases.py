"""The phases of a load, as a neuron tells them."""

from __future__ import annotations

import asyncio

from cortex.control.loads.load_phases import EVICTING, LoadPhases
from cortex.fleet.state import Fleet
from shared.protocol import Discovery, ModelView, NeuronHealth, Progress
from tests.cortex.fleets import replica_key

KEY = replica_key("m", "beast", "1")


async def test_phases_last_until_the_next_one() -> None:
    """Reports of one phase are one phase, those of other kinds of neurons count together, and the last one ends with
    the load."""
    now = 0.0
    fleet = Fleet([("beast", "http://beast")], unhealthy_after=3)
    fleet.record_poll("beast", started=0.0, health=NeuronHealth(), models=[], discovery=Discovery())
    phases = LoadPhases(lambda: now)
    phases.begin(EVICTING)
    now = 2.0
    phases.begin("starting")
    async with phases.following(fleet, KEY):
        told = [("starting", 0.1), ("loading weights", 0.1), ("loading weights", 0.6), ("polishing", 0.1)]
        for phase, fraction in told:
            now += 1.0
            progress = Progress(phase=phase, fraction=fraction)
            fleet.update_model("beast", ModelView(id="m", instance="1", status="loading", progress=progress))
            for _ in range(3):  # the follower's turn
                await asyncio.sleep(0)
        now = 10.0
        fleet.update_model("beast", ModelView(id="m", instance="1", status="loaded"))
    assert [(phase.name, phase.since, phase.until) for phase in phases.ended()] == [
        ("evicting", 0.0, 2.0), ("starting", 2.0, 4.0), ("loading weights", 4.0, 6.0), ("other", 6.0, 10.0),
    ]  # fmt: skip


async def test_a_removed_neuron_ends_the_phases() -> None:
    """And does not fail the load that they belong to."""
    now = 0.0
    fleet = Fleet([("beast", "http://beast")], unhealthy_after=3)
    fleet.record_poll("beast", started=0.0, health=NeuronHealth(), models=[], discovery=Discovery())
    phases = LoadPhases(lambda: now)
    async with phases.following(fleet, KEY):
        progress = Progress(phase="starting", fraction=0.1)
        fleet.update_model("beast", ModelView(id="m", instance="1", status="loading", progress=progress))
        for _ in range(3):  # the follower's turn
            await asyncio.sleep(0)
        (follower,) = [task for task in asyncio.all_tasks() if task.get_name().startswith("phases of m")]
        fleet.configure([], unhealthy_after=3)
        assert await follower is None
        now = 2.0
    assert [(phase.name, phase.since, phase.until) for phase in phases.ended()] == [("starting", 0.0, 2.0)]
