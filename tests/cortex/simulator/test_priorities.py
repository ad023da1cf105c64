"""Priorities and fairness of the planner over whole traces: more models than cards, all of them busy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cortex.control.scheduler import Policy
from cortex.placement.fair_queue import LoadSchedule
from cortex.placement.inputs import PlanningView
from cortex.simulator.fleet_file import SimulatedFleet
from cortex.simulator.outcome import Outcome
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import Simulation
from cortex.simulator.trace import Ask
from cortex.simulator.virtual_time import run_in_virtual_time
from tests.cortex.simulator.test_simulator import fleet_of

SEEDS = (1, 2)
POPULAR = ("vip", "a", "b", "c")
LOAD_SECS, UNLOAD_SECS, LONGEST_REQUEST_SECS = 10.0, 2.0, 10.0


def _fleet(tmp_path: Path, *, vip_priority: int, rare_priority: int, rare_cards: int = 1) -> SimulatedFleet:
    """Two cards for five models, one of them asked for rarely."""
    priorities = {"vip": vip_priority, "a": 50, "b": 50, "c": 50, "rare": rare_priority}
    models: list[str] = []
    for name, priority in priorities.items():
        cards = rare_cards if name == "rare" else 1
        size = f"min_devices = {cards}\nvram_mb = {20000 * cards}"
        models.append(f'[[models]]\nid = "{name}"\n{size}\nresidency_priority = {priority}\n')
    head = f"""
load_secs = {{ base = {LOAD_SECS}, per_gb = 0, unload = {UNLOAD_SECS} }}
nodes = [{{ name = "solo", devices = ["RTX 4090", "RTX 4090"] }}]
"""
    return fleet_of(tmp_path, head + "".join(models))


def _asks(seed: int, every_secs: float) -> list[Ask]:
    """Requests for each popular model, and three for the rare one, in twenty minutes."""
    chance = random.Random(seed)
    asks = [Ask(at, "rare", 5.0) for at in (100.0 + chance.uniform(0, 100), 500.0, 900.0)]
    for model in POPULAR:
        at = chance.expovariate(1 / every_secs)
        while at < 1200:
            asks.append(Ask(at, model, chance.uniform(2, LONGEST_REQUEST_SECS)))
            at += chance.expovariate(1 / every_secs)
    return sorted(asks)


def _play(fleet: SimulatedFleet, seed: int, *, every_secs: float = 10.0) -> tuple[Outcome, list[tuple[str, str]]]:
    """The planner's outcome, and its evictions: (the model to load, the evicted one)."""
    evictions: list[tuple[str, str]] = []
    planner = POLICIES["planner"]

    def schedule_loads(view: PlanningView) -> LoadSchedule:
        schedule = planner.schedule_loads(view)
        evictions.extend(
            (plan.model_id, each.resident.key.model_id)
            for plan in schedule.loads
            for each in plan.eviction_plan.evictions
        )
        return schedule

    async def play() -> Outcome:
        policy = Policy(schedule_loads, planner.reconcile_replicas)
        return await Simulation(fleet, _asks(seed, every_secs), policy, "planner").run()

    return run_in_virtual_time(play()), evictions


def _longest_wait(fleet: SimulatedFleet) -> float:
    """What docs/placement.md promises: until a model starves, then until those loaded by then may go."""
    rules = fleet.rules
    starving = max(rules.starvation_secs, rules.patience_secs)
    return starving + rules.min_residency_secs + LONGEST_REQUEST_SECS + UNLOAD_SECS + LOAD_SECS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_higher_priority_goes_first_and_a_rare_model_gets_its_turn(tmp_path: Path, seed: int) -> None:
    """The model above the others is never evicted for them and hardly waits. Among equals the rare one, for which one
    request at a time waits, is served before others would starve it."""
    fleet = _fleet(tmp_path, vip_priority=200, rare_priority=50)
    outcome, evictions = _play(fleet, seed)
    waits = {model: each.waiting for model, each in outcome.by_model.items()}
    assert outcome.total.unserved == 0
    assert "vip" not in {evicted for _, evicted in evictions}
    assert {"a", "b", "c"} <= {evicted for _, evicted in evictions}  # they do compete
    assert all(waits["vip"].mean < 0.1 * waits[model].mean for model in ("a", "b", "c", "rare"))
    assert max(each.max for each in waits.values()) <= _longest_wait(fleet)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rare_model_that_needs_both_cards_gets_them(tmp_path: Path, seed: int) -> None:
    """The cards are never free together, as one of the others always waits: it gets them because the memory is reserved
    for it once it has waited for `starvation_secs`. The others are not held up for long."""
    fleet = _fleet(tmp_path, vip_priority=50, rare_priority=50, rare_cards=2)
    outcome, _ = _play(fleet, seed, every_secs=5.0)
    assert outcome.total.unserved == 0
    longest = _longest_wait(fleet) + LONGEST_REQUEST_SECS  # last requests on either card
    assert fleet.rules.starvation_secs <= outcome.by_model["rare"].waiting.max <= longest
    assert all(outcome.by_model[model].waiting.max <= fleet.rules.starvation_secs / 2 for model in POPULAR)


@pytest.mark.parametrize("seed", SEEDS)
def test_below_all_that_hold_memory_a_model_is_refused_and_does_not_hang(tmp_path: Path, seed: int) -> None:
    """It evicts none of them, and its requests learn that within the time of two loads."""
    outcome, evictions = _play(_fleet(tmp_path, vip_priority=200, rare_priority=10), seed)
    rare = outcome.by_model["rare"]
    assert "rare" not in {loaded for loaded, _ in evictions}
    assert rare.unserved == rare.requests == 3
    assert rare.waiting.max <= 2 * (LOAD_SECS + UNLOAD_SECS + LONGEST_REQUEST_SECS)
    assert outcome.total.unserved == 3
