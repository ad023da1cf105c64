"""Planning views written by hand, for tests of the planner. The time is always `NOW`, and times are given as ages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cortex.config.catalogue import Catalogue
from cortex.config.profile import ModelProfile
from cortex.config.settings import Rules
from cortex.fleet.snapshot import FleetSnapshot
from cortex.placement.inputs import Arrivals, Backoff, PlanningView, ReplicaUsage, WaitingRequests
from cortex.placement.load_plan import LoadPlan
from cortex.placement.planner import all_verdicts, best_plan
from cortex.routing.replica import ModelOnNode
from tests.cortex.fleets import replica_key

NOW = 10_000.0
RULES = Rules(min_residency_secs=30, patience_secs=15, starvation_secs=60, pause_secs=1)
"""Easy to reckon with."""


def profile(**fields: Any) -> ModelProfile:
    return ModelProfile.model_validate({"id": "m", **fields})


def used(working: int = 0, *, idle: float = 500.0, age: float = 1000.0) -> ReplicaUsage:
    """`idle` seconds since the last request, `age` since the load."""
    return ReplicaUsage(working, NOW - idle, NOW - age)


def asked(*secs_ago: float) -> Arrivals:
    """Requests that arrived so many seconds ago, the oldest first."""
    return Arrivals(tuple(NOW - secs for secs in secs_ago))


def view(
    where: FleetSnapshot,
    *models: ModelProfile,
    waiting: Mapping[str, float] | None = None,
    usages: Mapping[Any, ReplicaUsage] | None = None,
    backoffs: Mapping[ModelOnNode, Backoff] | None = None,
    overloaded_secs: Mapping[str, float] | None = None,
    rules: Rules | None = None,
    now: float = NOW,
    **fields: Any,
) -> PlanningView:
    """`usages` are by model id and node name, with an instance where there are several. `waiting` and
    `overloaded_secs` are seconds by model: for how long requests wait, or the load has been too high."""
    catalogue = Catalogue(models=models)
    return PlanningView(
        now=now,
        catalogue=catalogue,
        fleet=replace(where, catalogue=catalogue),
        rules=rules or RULES,
        waiting={model_id: WaitingRequests(1, now - secs) for model_id, secs in (waiting or {}).items()},
        usages={replica_key(*key): usage for key, usage in (usages or {}).items()},
        backoffs=backoffs or {},
        overloaded_since={model_id: now - secs for model_id, secs in (overloaded_secs or {}).items()},
        **fields,
    )


def planned(moment: PlanningView, model_id: str = "m") -> LoadPlan | None:
    """The plan for a model, None when it can only wait or be refused."""
    wanted = moment.profile(model_id)
    assert wanted is not None
    return best_plan(all_verdicts(moment, wanted))


def plan_for(moment: PlanningView, model_id: str = "m") -> LoadPlan:
    plan = planned(moment, model_id)
    assert plan is not None
    return plan


def evicted(plan: LoadPlan) -> set[str]:
    return {each.resident.key.model_id for each in plan.eviction_plan.evictions}
