"""What to load now for the waiting models, in fair order. Pure.

Models that share memory take turns. The claim of a model is that of the most deserving of the callers that wait for it:
its key's priority, and how little device time it has used. Among models of equal priorities and claims, the one whose
requests have waited longest, all together, goes first. A model that has waited for `starvation_secs` goes before all
others, and the memory it waits for is reserved for it. One load serves every request
that waits for the model, so ABCABC becomes AABBCC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import LoadPlan
from cortex.placement.planner import NodeVerdict, best_plan, candidate_verdicts
from cortex.placement.refusal import placement_error
from shared.errors import ServiceError


@dataclass(frozen=True)
class LoadSchedule:
    """What to do for the waiting models.

    `loads` should start now. `rejected` maps models that cannot be served to the error. `wait_reasons` says what the
    other models wait for. `recheck_at` is when to decide again if nothing happens first, on the view's clock.
    """

    loads: tuple[LoadPlan, ...] = ()
    rejected: Mapping[str, ServiceError] = field(default_factory=dict)
    wait_reasons: Mapping[str, str] = field(default_factory=dict)
    recheck_at: float | None = None


def schedule_loads(view: PlanningView) -> LoadSchedule:
    """Decides for each model in `view.waiting`. Skips models that are already served or loading."""
    loads: list[LoadPlan] = []
    rejected: dict[str, ServiceError] = {}
    wait_reasons: dict[str, str] = {}
    recheck_at: list[float] = []
    reserved: dict[str, str] = {}  # node -> the starving model it is reserved for
    queued = [model_id for model_id in view.waiting if not is_served_or_loading(view, model_id)]
    for model_id in in_fair_order(view, queued):
        if view.fleet.reservation_of(model_id) is not None:
            continue  # one for another name of the model has just been planned
        profile = view.profile(model_id)
        verdicts = () if profile is None else candidate_verdicts(view, profile)
        found = [_unless_reserved(reserved, verdict) for verdict in verdicts]
        plan = best_plan(found)
        if plan is None:
            if any(verdict.temporary for verdict in found):
                recheck_at += [backoff.until for backoff in view.backoffs_of(model_id)]
                wait_reasons[model_id] = "; ".join(f"{each.node} {each.reason}" for each in found if each.temporary)
                if is_starving(view, model_id):
                    reserved.setdefault(min(each.node for each in found if each.temporary), model_id)
            else:
                rejected[model_id] = placement_error(view, model_id, found)
        elif plan.ready_at > view.now:
            recheck_at.append(plan.ready_at)
            because = plan.eviction_plan.waits_because(view.now)
            wait_reasons[model_id] = f"waiting for its turn: {plan.reason}{f'; {because}' if because else ''}"
            if is_starving(view, model_id):
                view = after_start(view, plan)
        else:
            loads.append(plan)
            view = after_start(view, plan)
    return LoadSchedule(tuple(loads), rejected, wait_reasons, min(recheck_at, default=None))


def after_start(view: PlanningView, plan: LoadPlan) -> PlanningView:
    """The view once this plan has started."""
    evicting = [each.resident.key for each in plan.eviction_plan.evictions]
    return replace(view, fleet=view.fleet.with_load(plan.reservations, evicting))


def is_served_or_loading(view: PlanningView, model_id: str) -> bool:
    """Whether the model is served, coming up, or being loaded by us."""
    fleet = view.fleet
    return (
        fleet.reservation_of(model_id) is not None
        or bool(fleet.serving(model_id))
        or fleet.loading_on(model_id) is not None
    )


def is_starving(view: PlanningView, model_id: str) -> bool:
    """Whether the model goes first because of its wait, whatever the claims."""
    return view.now - view.unserved_since(view.waiting[model_id]) >= view.rules.starvation_secs


def _unless_reserved(reserved: Mapping[str, str], verdict: NodeVerdict) -> NodeVerdict:
    """Excludes a node that is reserved for a starving model."""
    nodes = (verdict.node,) if verdict.plan is None else verdict.plan.nodes
    taken = next((node for node in nodes if node in reserved), None)
    if taken is None or (verdict.plan is None and not verdict.temporary):
        return verdict
    return NodeVerdict(verdict.node, None, f"is reserved for {reserved[taken]}", temporary=True)


def in_fair_order(view: PlanningView, models: Iterable[str]) -> list[str]:
    """These waiting models, the one that goes first at the front."""
    return sorted(models, key=partial(_fair_order, view))


def _fair_order(view: PlanningView, model_id: str) -> tuple[object, ...]:
    waiting = view.waiting[model_id]
    if is_starving(view, model_id):
        return False, 0, waiting.since, model_id
    claim = view.claim(model_id)
    waited = -view.waited_secs(waiting), waiting.since, model_id
    return True, *claim.level, -view.priority(model_id), claim.used, *waited
