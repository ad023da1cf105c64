"""What to load now for every waiting model. Pure: takes a view, returns the steps and when to look again.

Models that share memory take turns. Among equal priorities the longest wait goes first. A model that has waited for
`starvation_secs` goes before all others, and the memory it waits for is reserved for it. One load serves every request
that waits for the model, so ABCABC becomes AABBCC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cortex.placement.inputs import View
from cortex.placement.planner import Plan, Verdict, best, likely_verdicts
from cortex.placement.refusal import refusal
from shared.errors import ServiceError


@dataclass(frozen=True)
class Turn:
    """The result of one look at the fleet.

    `loads` should start now. `refused` maps models that cannot be served to the reason. `notes` say what the other
    models are waiting for. `wake_at` is when to look again if nothing happens first, on the view's clock.
    """

    loads: tuple[Plan, ...] = ()
    refused: Mapping[str, ServiceError] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    wake_at: float | None = None


def next_turn(view: View) -> Turn:
    """The loads to start for the models in `view.waiting`. Models already served or loading are skipped."""
    loads: list[Plan] = []
    refused: dict[str, ServiceError] = {}
    notes: dict[str, str] = {}
    wake_at: list[float] = []
    kept: dict[str, str] = {}  # node -> the starved model it is reserved for
    for model_id in sorted((m for m in view.waiting if not has_a_place(view, m)), key=lambda m: _turn_order(view, m)):
        profile = view.profile(model_id)
        found = [] if profile is None else [_unless_kept(kept, each) for each in likely_verdicts(view, profile)]
        plan = best(found)
        if plan is None:
            if any(verdict.passes for verdict in found):
                wake_at += [bar.until for (m, _), bar in view.bars.items() if m == model_id and bar.until > view.now]
                notes[model_id] = "; ".join(f"{each.node} {each.reason}" for each in found if each.passes)
                if _starved(view, model_id):
                    kept.setdefault(min(each.node for each in found if each.passes), model_id)
            else:
                refused[model_id] = refusal(view, model_id, found)
        elif plan.ready_at > view.now:
            wake_at.append(plan.ready_at)
            notes[model_id] = f"waiting for a turn: {plan.reason}"
            if _starved(view, model_id):
                view = after(view, plan)
        else:
            loads.append(plan)
            view = after(view, plan)
    return Turn(tuple(loads), refused, notes, min(wake_at, default=None))


def after(view: View, plan: Plan) -> View:
    """The view after this plan has started."""
    leaving = [each.resident.key for each in plan.displacement.evictions]
    return replace(view, fleet=view.fleet.with_load(plan.reservation, leaving))


def has_a_place(view: View, model_id: str) -> bool:
    """Whether the model is served, coming up, or being loaded by us."""
    fleet = view.fleet
    return fleet.load_of(model_id) is not None or bool(fleet.serving(model_id)) or fleet.coming(model_id) is not None


def _starved(view: View, model_id: str) -> bool:
    return view.now - view.waiting[model_id].since >= view.rules.starvation_secs


def _unless_kept(kept: Mapping[str, str], verdict: Verdict) -> Verdict:
    """Excludes a node that is reserved for a starved model."""
    if verdict.node not in kept or (verdict.plan is None and not verdict.passes):
        return verdict
    return Verdict(verdict.node, None, f"is reserved for {kept[verdict.node]}", passes=True)


def _turn_order(view: View, model_id: str) -> tuple[object, ...]:
    starved = _starved(view, model_id)
    return not starved, 0 if starved else -view.priority(model_id), view.waiting[model_id].since, model_id
