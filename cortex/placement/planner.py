"""Where to load a model, or why it cannot be placed: evaluates every node worth it and picks the best plan. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cortex.config.catalogue import ModelProfile
from cortex.config.durations import duration_text
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.candidates import candidate_nodes
from cortex.placement.feasibility import infeasible_reason
from cortex.placement.inputs import DRAINING, PlanningView
from cortex.placement.node_plan import Fit, LoadPlan, Rejection, plan_on_node


@dataclass(frozen=True)
class NodeVerdict:
    """The result for one node: its best plan, or why it has none."""

    node: str
    plan: LoadPlan | None
    reason: str
    temporary: bool = False


def candidate_verdicts(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What the most promising nodes could do for the model; every node when none of those can do anything."""
    found = [evaluate_node(view, profile, node) for node in candidate_nodes(view, profile)]
    promising = any(each.temporary or (each.plan is not None and each.plan.fit is not Fit.TOO_LARGE) for each in found)
    return found if promising or len(found) == len(view.fleet.nodes) else all_verdicts(view, profile)


def all_verdicts(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What each node of the fleet could do for a first or additional replica of the model."""
    return [evaluate_node(view, profile, node) for node in view.fleet.nodes.values()]


def best_plan(found: Iterable[NodeVerdict]) -> LoadPlan | None:
    """The best of these plans. None when there is none, or when waiting is better: a load that does not fit by the
    figures is only tried when no node will become available."""
    listed = list(found)
    plan = min((each.plan for each in listed if each.plan is not None), key=lambda plan: plan.rank, default=None)
    hope = any(each.temporary for each in listed)
    return None if plan is not None and plan.fit is Fit.TOO_LARGE and hope else plan


def evaluate_node(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> NodeVerdict:
    """What one node could do for the model."""
    rejection = _rejection(view, profile, node)
    found = plan_on_node(view, profile, node) if rejection is None else rejection
    if isinstance(found, Rejection):
        return NodeVerdict(node.name, None, found.reason, found.temporary)
    return NodeVerdict(node.name, found, found.fit_reason)


def _rejection(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> Rejection | None:
    """Why the node is ruled out before its memory is considered, if it is."""
    reason = infeasible_reason(profile, node)
    if reason is None and node.discovery is None:
        reason = f"not reached yet: {node.last_error or 'no answer so far'}"
    if reason is None and not node.healthy:
        reason = f"down: {node.last_error}"
    if reason is None and node.draining:
        reason = "draining"
    return _temporary_rejection(view, profile, node) if reason is None else Rejection(reason)


def _temporary_rejection(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> Rejection | None:
    for engine in node.engines(profile.id):
        entry = engine.view
        if engine.key in view.fleet.evicting:
            return Rejection("is unloading it", temporary=True)
        if entry.state == DRAINING:  # by another cortex; a load would wait until it is gone
            return Rejection("is still draining it", temporary=True)
        if entry.loaded:
            why = entry.unservable_because
            return Rejection("already serves it" if why is None else f"says that it cannot serve it now ({why})")
    if node.is_loading(profile.id):
        return Rejection("is already loading it", temporary=True)
    return _pause(view, profile.id, node.name)


def _pause(view: PlanningView, model_id: str, node: str) -> Rejection | None:
    """Why the model is not loaded on the node for some time: an operator's hold, or a failure."""
    held_until, backoff = view.held_until(model_id, node), view.backoff(model_id, node)
    if held_until is not None:
        return Rejection(f"an operator holds it back for another {duration_text(held_until - view.now)}")
    if backoff is not None:
        return Rejection(
            f"not tried again for {backoff.until - view.now:.1f} s: {backoff.reason}", temporary=backoff.temporary
        )
    return None
