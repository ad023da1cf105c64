"""Moments written out by hand, for tests of the planner. The time is always `NOW`, and times are given as ages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortex.config.catalogue import Catalogue, ModelProfile
from cortex.config.settings import Rules
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.inputs import Backoff, Key, Use, View, Waiting
from cortex.placement.planner import Plan, best, verdicts

NOW = 10_000.0
RULES = Rules(min_residency_secs=30, patience_secs=15, starvation_secs=60, pause_secs=1)
"""Easy to reckon with."""


def profile(**fields: Any) -> ModelProfile:
    return ModelProfile.model_validate({"id": "m", **fields})


def used(working: int = 0, *, idle: float = 500.0, age: float = 1000.0) -> Use:
    """`idle` seconds since the last request, `age` since the load."""
    return Use(working, NOW - idle, NOW - age)


def view(
    where: FleetSnapshot,
    *models: ModelProfile,
    waiting: Mapping[str, float] | None = None,
    uses: Mapping[Key, Use] | None = None,
    bars: Mapping[Key, Backoff] | None = None,
    pressed: Mapping[str, float] | None = None,
    rules: Rules | None = None,
    now: float = NOW,
    **fields: Any,
) -> View:
    """`waiting` and `pressed` are seconds by model: for how long requests wait, or the load has been too high."""
    return View(
        now=now,
        catalogue=Catalogue(models=models),
        fleet=where,
        rules=rules or RULES,
        waiting={model_id: Waiting(1, now - secs) for model_id, secs in (waiting or {}).items()},
        uses=uses or {},
        bars=bars or {},
        pressed={model_id: now - secs for model_id, secs in (pressed or {}).items()},
        **fields,
    )


def planned(moment: View, model_id: str = "m") -> Plan | None:
    """The plan for a model, None when it can only wait or be refused."""
    wanted = moment.profile(model_id)
    assert wanted is not None
    return best(verdicts(moment, wanted))


def plan_for(moment: View, model_id: str = "m") -> Plan:
    plan = planned(moment, model_id)
    assert plan is not None
    return plan


def evicted(plan: Plan) -> set[str]:
    return {each.resident.key[0] for each in plan.displacement.evictions}
