"""The scheduler between decisions and their effects, against real seed neurons."""

from __future__ import annotations

from tests.cortex.conftest import StartCortex
from tests.cortex.seed_neuron import SeedNeuron

LOW = {"id": "org/low", "vram_mb": 20000}
HIGH = {"id": "org/high", "vram_mb": 20000, "residency_priority": 200}


async def test_two_who_come_at_the_same_moment_cause_one_load_each(
    start_cortex: StartCortex, beast: SeedNeuron, benjy: SeedNeuron
) -> None:
    """What has just been begun counts at once, also for the decision that follows in the same turn of the loop."""
    benjy.load_gate.clear()
    beast.load_gate.clear()
    cortex = await start_cortex([benjy, beast], [LOW, HIGH])
    parts = cortex.parts
    scheduler = parts.scheduler
    with parts.rooms.seat("org/low", scheduler.retry_after):
        scheduler.want("org/low")
        with parts.rooms.seat("org/high", scheduler.retry_after):
            scheduler.want("org/high")
            jobs = [(job.model_id, job.node) for job in parts.loader.jobs()]
    assert jobs == [("org/low", "benjy"), ("org/high", "beast")]
