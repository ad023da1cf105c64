"""Where to load a model, or why it cannot be placed: evaluates every node worth it and picks the best plan. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cortex.config.durations import duration_text
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.candidates import candidate_nodes
from cortex.placement.eviction import EvictionClass, EvictionPlan
from cortex.placement.feasibility import (
    can_hold_part,
    infeasible_reason,
    inferred_variant,
    oversize_reason,
    reports_variants,
)
from cortex.placement.inputs import DRAINING, PlanningView
from cortex.placement.instances import has_room, instances_on
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.node_plan import Rejection, plan_on_node
from cortex.placement.spans import NetworkBetween, Span, network_between, spans_of, well_connected
from cortex.placement.starts import starting_groups
from shared.protocol import ModelStatus

MAX_GOOD_NODES = 12
"""How many nodes of a large fleet are compared that could load a model at once. Candidates are in order of fit."""
_BEFORE_THE_NEXT_FIT = 0.5
"""An engine on one node goes before one over several that fits equally well."""


@dataclass(frozen=True)
class NodeVerdict:
    """The result for one node: its best plan, or why it has none. `passed_over`: the better variants of the model with
    the reason against each."""

    node: str
    plan: LoadPlan | None
    reason: str
    temporary: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()


def candidate_verdicts(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What the most promising nodes could do for the model; every node when none of those can do anything."""
    found = _of_candidates(view, profile) + _over_several(view, profile)
    promising = any(each.temporary or (each.plan is not None and each.plan.fit is not Fit.TOO_LARGE) for each in found)
    return found if promising or len(found) >= len(view.fleet.nodes) else all_verdicts(view, profile)


def _of_candidates(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What the candidates could do. In a large fleet the rest is left out once `MAX_GOOD_NODES` with enough free memory
    could load it without any wait, or as many without enough could by evicting idle models."""
    nodes = candidate_nodes(view, profile)
    large = len(nodes) < len(view.fleet.nodes)
    needs_mb = [(choice.device_count, view.device_share_mb(choice)) for choice in profile.choices]
    good = {True: 0, False: 0}
    found: list[NodeVerdict] = []
    for node in nodes:
        has_memory = any((node.free_mb_on_each_of(devices) or 0) >= share for devices, share in needs_mb)
        if large and good[has_memory] >= MAX_GOOD_NODES:
            continue
        verdict = evaluate_node(view, profile, node)
        good[has_memory] += verdict.plan is not None and _is_immediate(view, verdict.plan)
        found.append(verdict)
    return found


def _is_immediate(view: PlanningView, plan: LoadPlan) -> bool:
    """Whether it waits for nothing, and disturbs no model in use."""
    idle = plan.eviction_plan.eviction_class is EvictionClass.IDLE
    return plan.fit is not Fit.TOO_LARGE and idle and plan.ready_at <= view.now and not plan.starts.models


def all_verdicts(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What each node of the fleet could do for a first or additional replica of the model, and several together."""
    alone = [evaluate_node(view, profile, node) for node in view.fleet.nodes.values()]
    return alone + _over_several(view, profile)


def _over_several(view: PlanningView, profile: ModelProfile) -> list[NodeVerdict]:
    """What several nodes could do together for a model with `span_nodes`: one verdict, or none if no nodes could ever.
    The best variant counts, and of that the best way to spread it for which there are nodes."""
    waiting: list[NodeVerdict] = []
    for span in (span for choice in profile.choices for span in spans_of(choice)):
        nodes = [node for node in view.fleet.nodes.values() if can_hold_part(span.part, node)]
        if len(nodes) < span.hosts:
            continue
        found = [_part_on(view, span.part, node) for node in nodes]
        plan = plan_together(view, span, (each.plan for each in found if each.plan is not None))
        if plan is not None:
            return [NodeVerdict(" + ".join(plan.nodes), plan, plan.fit_reason)]
        reasons = "; ".join(f"{each.node} {each.reason}" for each in found if each.plan is None)
        why = f"{span.hosts} neurons with equal cards are needed for {span.whole}: {reasons or 'the cards differ'}"
        waiting.append(NodeVerdict("together", None, why, temporary=any(each.temporary for each in found)))
    return sorted(waiting, key=lambda each: not each.temporary)[:1]


def _part_on(view: PlanningView, part: ModelProfile, node: NodeSnapshot) -> NodeVerdict:
    """What the node could do for a part. It does not wait there for a start while another group starts: two groups
    could wait for each other, so the neuron may refuse it."""
    verdict = evaluate_node(view, part, node)
    others = starting_groups(view, node, part.id) if verdict.plan is not None and verdict.plan.starts.models else []
    if not others:
        return verdict
    return NodeVerdict(node.name, None, f"waits until {', '.join(others)} has started there", temporary=True)


def plan_together(view: PlanningView, span: Span, parts: Iterable[LoadPlan]) -> LoadPlan | None:
    """The best group of the nodes that could take a part now, given the plan on each; None if there are too few with
    equal cards: the slowest card sets the pace of all. The network between the nodes comes first, because it sets the
    pace for as long as the engine runs, then what has to be evicted for it."""
    by_cards: dict[tuple[tuple[str, int], ...], list[LoadPlan]] = {}
    for part in parts:
        if part.fit is not Fit.TOO_LARGE and not part.wakes:
            by_cards.setdefault(_cards(view.fleet, part), []).append(part)
    groups = (group for alike in by_cards.values() for group in well_connected(alike, span.hosts, view.network_of))
    whole = [
        (between.rank, _together(span, group, between))
        for group in groups
        for between in [network_between(view.network_of(part.node) for part in group)]
    ]
    _, best = min(whole, key=lambda each: (each[0], each[1].rank), default=(None, None))
    return best


def _cards(fleet: FleetSnapshot, part: LoadPlan) -> tuple[tuple[str, int], ...]:
    devices = {device.index: (device.name, device.vram_total_mb) for device in fleet.nodes[part.node].devices}
    return tuple(sorted(devices[index] for index in part.devices))


def _together(span: Span, parts: list[LoadPlan], between: NetworkBetween) -> LoadPlan:
    """The plan of the whole engine; the part that fits best takes the requests."""
    first, *others = parts
    evictions = EvictionPlan(tuple(each for part in parts for each in part.eviction_plan.evictions))
    worst = max(parts, key=lambda part: part.rank)
    starts = max((part.starts for part in parts), key=lambda each: (each.rank, each.remaining_secs))
    return replace(
        first,
        fit=worst.fit,
        spare_mb=sum(part.spare_mb for part in parts),
        eviction_plan=evictions,
        ready_at=max(part.ready_at for part in parts),
        starts=starts,
        parts=tuple(others),
        whole=span.whole,
        network=str(between),
        rank=(worst.fit + _BEFORE_THE_NEXT_FIT, evictions.order, *(part.rank for part in parts)),
    )


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
    if rejection is not None:
        return NodeVerdict(node.name, None, rejection.reason, rejection.temporary)
    return plan_variant(view, profile, node)


def plan_variant(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> NodeVerdict:
    """What a feasible node could do for the model, and in which variant. Ignores health.

    It is the first variant that the node could hold if it were empty, so a busy node gets its best one too. If nothing
    can be done for that one now, because models that may not be evicted are in the way or it failed there, it is the
    next one. One that sleeps there is woken.
    """
    if profile.variant is None and not profile.variants:
        return _verdict(node, plan_on_node(view, profile, node))
    only = profile.variant is not None
    awake = _awake(view, profile, node)
    if awake is not None:
        return _verdict(node, awake)
    found: list[tuple[ModelProfile, LoadPlan | Rejection]] = []
    for choice in sorted(profile.choices, key=lambda each: oversize_reason(each, node) is not None):
        unsuitable = _unsuitable_reason(view, choice, node)
        pause = _backoff(view, choice.requested.name, node.name)
        result = Rejection(unsuitable) if unsuitable is not None else pause or _planned(view, choice, node, only)
        found.append((choice, result))
        if result.temporary if isinstance(result, Rejection) else result.fit is not Fit.TOO_LARGE:
            break
    else:
        plans = [each for each in found if isinstance(each[1], LoadPlan)]
        if not plans:
            reason = "; ".join(f"{choice.variant} {_against(choice, node, result)}" for choice, result in found)
            return NodeVerdict(node.name, None, reason)
        choice, result = plans[0]
    better = [each for each in profile.choices if each.place < choice.place]
    results = {each.place: result for each, result in found}
    passed_over = [(str(each.variant), _against(each, node, results.get(each.place))) for each in better]
    return replace(_verdict(node, result), passed_over=tuple(passed_over))


def _planned(view: PlanningView, choice: ModelProfile, node: NodeSnapshot, only: bool) -> LoadPlan | Rejection:
    """`only`: no other variant will do. If there is no free memory apart from the model's other engines, it shares
    their devices, or takes the place of other variants."""
    apart = plan_on_node(view, choice, node)
    if not only or (isinstance(apart, LoadPlan) and apart.fit <= Fit.OVER_SLEEPERS):
        return apart
    beside = plan_on_node(view, choice, node, only_variant=True)
    if isinstance(apart, LoadPlan) and isinstance(beside, LoadPlan):
        return min(apart, beside, key=lambda plan: plan.rank)
    return apart if isinstance(apart, LoadPlan) else beside


def _verdict(node: NodeSnapshot, found: LoadPlan | Rejection) -> NodeVerdict:
    if isinstance(found, Rejection):
        return NodeVerdict(node.name, None, found.reason, found.temporary)
    return NodeVerdict(node.name, found, found.fit_reason)


def _awake(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> LoadPlan | None:
    """The plan that wakes the variant that sleeps on the node, if there is one and its memory is available."""
    asleep = {
        entry.variant for entry in node.instances(profile.id).values() if entry.known_status is ModelStatus.SLEEPING
    }
    for choice in profile.choices:
        if choice.variant in asleep and _backoff(view, choice.requested.name, node.name) is None:
            plan = plan_on_node(view, choice, node)
            if isinstance(plan, LoadPlan) and plan.fit is Fit.AWAKE:
                return plan
    return None


def _unsuitable_reason(view: PlanningView, choice: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why the node never gets this variant."""
    reason = infeasible_reason(choice, node)
    if reason is not None or reports_variants(node):
        return reason
    only = inferred_variant(view.catalogue.profile(choice.id) or choice, node)
    if only in (None, choice.variant):
        return None
    return f"is not loaded there: the neuron does not report variants, so it gets {only} only"


def _against(choice: ModelProfile, node: NodeSnapshot, found: LoadPlan | Rejection | None) -> str:
    """Why another variant is preferred, or none can be loaded."""
    if isinstance(found, Rejection):
        return found.reason
    return oversize_reason(choice, node) or ("" if found is None else found.fit_reason)


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
    here = instances_on(view, profile.id, node, profile.variant)
    return _pause(view, profile.id, node.name) if has_room(profile, node, here) else _occupied(view, profile, node)


def _occupied(view: PlanningView, profile: ModelProfile, node: NodeSnapshot) -> Rejection:
    """Why the node gets no instance beside those that it has."""
    engines = list(node.engines(profile.id))
    if any(engine.key in view.fleet.evicting for engine in engines):
        return Rejection("is unloading it", temporary=True)
    if any(engine.view.state == DRAINING for engine in engines):  # by another cortex; a load would wait for its end
        return Rejection("is still draining it", temporary=True)
    others = [each.view for each in engines if profile.variant is not None and each.view.variant != profile.variant]
    if any(entry.loaded or entry.coming for entry in others):
        return Rejection(f"has it as {others[0].variant or 'another variant'}")
    loaded = [engine.view for engine in engines if engine.view.loaded]
    unservable = [entry.unservable_because for entry in loaded if entry.unservable_because is not None]
    if unservable:
        return Rejection(f"says that it cannot serve it now ({unservable[0]})")
    if loaded:
        return Rejection("already serves it" if len(loaded) == 1 else f"already serves it with {len(loaded)} instances")
    return Rejection("is already loading it", temporary=True)


def _pause(view: PlanningView, model_id: str, node: str) -> Rejection | None:
    """Why the model is not loaded on the node for some time: an operator's hold, or a failure."""
    held_until = view.held_until(model_id, node)
    if held_until is not None:
        return Rejection(f"an operator holds it back for another {duration_text(held_until - view.now)}")
    return _backoff(view, model_id, node)


def _backoff(view: PlanningView, name: str, node: str) -> Rejection | None:
    """After a failure of the model, or of `id@variant`."""
    backoff = view.backoff(name, node)
    if backoff is None:
        return None
    return Rejection(f"not tried again for {backoff.until - view.now:.1f} s: {backoff.reason}", backoff.temporary)
