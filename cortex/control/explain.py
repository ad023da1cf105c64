"""Why a model is, or would be, loaded where it is. Pure: calls the deciding functions and keeps their reasons."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from cortex.config.profile import TOOLS_HINT, ModelProfile
from cortex.control.decision import Attach, Await, InFlight, Place, Refuse, Serve, decide
from cortex.control.wait_note import leaving_text
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.capacity import device_memory
from cortex.placement.devices import tensor_groups
from cortex.placement.eviction import EvictionClass
from cortex.placement.fair_queue import in_fair_order, is_served_or_loading, is_starving
from cortex.placement.feasibility import feasible_choices, possible_nodes
from cortex.placement.inputs import PlanningView
from cortex.placement.instances import coming
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.planner import NodeVerdict, all_verdicts, best_plan
from cortex.placement.refusal import held_back_error, placement_error
from cortex.placement.replicas import reconcile_replicas
from cortex.placement.starts import starts_by_device
from shared.errors import ServiceError
from shared.protocol import RAM, LinkKind

_FIT_LABELS = {
    Fit.AWAKE: "awake",
    Fit.NOW: "now",
    Fit.OVER_SLEEPERS: "over_sleepers",
    Fit.AFTER_EVICTION: "after_displacement",
    Fit.TOO_LARGE: "too_large",
}
"""`fits` in the reply; docs/api.md lists the values."""

_STATE_LABELS = {
    EvictionClass.IDLE: "idle",
    EvictionClass.BUSY: "busy",
    EvictionClass.RECENTLY_LOADED: "young",
    EvictionClass.RECENTLY_LOADED_BUSY: "young_busy",
}
"""`state` of an eviction in the reply."""


def explain(name: str, view: PlanningView, in_flight: InFlight) -> dict[str, Any]:
    """What a request for the model of this name would do now, and each node with the reason it fits or not. Memory in
    MiB, times in seconds."""
    model_id, alias = view.catalogue.resolve(name), view.catalogue.alias_of(name)
    profile = view.profile(model_id)
    found = [] if profile is None else all_verdicts(view, profile)
    by_node = {verdict.node: verdict for verdict in found}
    possible = {node.name for node in ([] if profile is None else possible_nodes(profile, view.fleet))}
    return {
        "model": model_id,
        **({} if alias is None else {"alias": {"name": name, **alias.parameters}}),
        **_base(model_id, view),
        "in_catalogue": view.catalogue.profile(model_id) is not None,
        "decision": _decision(model_id, view, found, in_flight),
        "claims": _claims(view),
        "replicas": _replicas(view, profile, found),
        "hints": []
        if profile is None or not any(choice.refuses_tools for choice in profile.choices)
        else [f"Clients cannot offer it tools: {TOOLS_HINT}."],
        "nodes": [
            _node(model_id, profile, view, node, by_node.get(node.name), possible=node.name in possible)
            for node in view.fleet.nodes.values()
        ],
    }


def _base(model_id: str, view: PlanningView) -> dict[str, Any]:
    """For an adapter: its base, which the rest of the answer is about, and the neurons that have the adapter."""
    adapter = view.catalogue.adapters.get(model_id)
    if adapter is None:
        return {}
    return {"base": adapter.base, "adapter_on": list(dict.fromkeys(e.node.name for e in view.fleet.serving(model_id)))}


def _claims(view: PlanningView) -> list[dict[str, Any]]:
    """The models that requests wait for and that are not coming yet, the one that goes first at the front, each with
    the most deserving caller that waits for it."""
    waiting = [model_id for model_id in view.waiting if not is_served_or_loading(view, model_id)]
    found: list[dict[str, Any]] = []
    for rank, model_id in enumerate(in_fair_order(view, waiting), start=1):
        claim, requests = view.claim(model_id), view.waiting[model_id]
        caller = claim.caller
        found.append(
            {
                "rank": rank,
                "model": model_id,
                "starving": is_starving(view, model_id),
                "key": None if caller is None else caller.name,
                "key_priority": 0 if caller is None else caller.priority,
                "model_priority": view.priority(model_id),
                "device_secs": round(claim.used, 1),
                "requests": requests.count,
                "keys": len(requests.callers),
                "waiting_secs": round(view.now - requests.since, 1),
            }
        )
    return found


def _replicas(view: PlanningView, profile: ModelProfile | None, found: list[NodeVerdict]) -> dict[str, Any] | None:
    """How many replicas there are, and what stands against those that are missing from the minimum; None for a model
    without a minimum."""
    if profile is None or not profile.replicas.min:
        return None
    serving = view.replicas(profile.id)
    starting = coming(view, profile.id) - serving
    reason = None
    if len(serving) + len(starting) < profile.replicas.min:
        loads = reconcile_replicas(view, [profile]).loads
        nodes = list(dict.fromkeys(plan.node for plan, _ in loads))
        reason = f"about to be loaded on {', '.join(nodes)}" if nodes else _what_is_in_the_way(found)
    return {
        "min": profile.replicas.min,
        "max": profile.replicas.max,
        "serving": len(serving),
        "coming": len(starting),
        "missing_because": reason,
    }


def _what_is_in_the_way(found: list[NodeVerdict]) -> str:
    return "; ".join(
        f"{verdict.node}: {verdict.reason}{'' if verdict.plan is None else ', which are in use'}" for verdict in found
    )


def after_unload(model_id: str, view: PlanningView) -> dict[str, Any]:
    """What becomes of a model that an operator has just unloaded somewhere: `next` in words, `next_node` where it is
    loaded again without a request or None, and its `replicas_min`."""
    fleet = view.fleet
    # An adapter has no replicas: the next request loads it.
    profile = None if model_id in view.catalogue.adapters else view.catalogue.profile(model_id)
    minimum = 0 if profile is None else profile.replicas.min
    serving = list(dict.fromkeys(engine.node.name for engine in fleet.serving(model_id)))
    reserved, coming = fleet.reservation_of(model_id), fleet.loading_on(model_id)
    node = reserved.node if reserved is not None else None if coming is None else coming.node.name
    because, hint = f"because its replicas.min is {minimum}", f"`cortex unload {model_id} --for 2h` holds it back"
    if not serving and node is None and held_back_error(view, model_id) is not None:
        text = "requests for it get 503 unavailable until then, unless another cortex or its neuron loads it"
    elif node is not None:
        text = f"it is being loaded again on {node}{f', {because}; {hint}' if minimum else ''}"
    elif len(fleet.serving(model_id)) >= max(1, minimum):
        text = f"{', '.join(serving)} still {'serves' if len(serving) == 1 else 'serve'} it"
    elif profile is None or not minimum:
        text = "the next request loads it again"
    else:
        loads = reconcile_replicas(view, [profile]).loads
        node = loads[0][0].node if loads else None
        when = "as soon as a neuron has room" if node is None else f"at once, on {node}"
        text = f"it will be loaded again {when}, {because}; {hint}"
    return {"next": text, "next_node": node, "replicas_min": minimum}


def _decision(model_id: str, view: PlanningView, found: list[NodeVerdict], in_flight: InFlight) -> dict[str, Any]:
    match decide(model_id, view.catalogue, view.fleet, in_flight):
        case Serve(replicas):
            nodes = list(dict.fromkeys(key.node for key in replicas))
            return {"action": "serve", "node": nodes[0], "reason": "loaded there", "replicas": nodes}
        case Attach(replicas):
            base, nodes = view.catalogue.requested(model_id).name, list(dict.fromkeys(key.node for key in replicas))
            reason = f"its base {base} is loaded there and has to load the adapter first"
            return {"action": "load_adapter", "node": nodes[0], "reason": reason, "replicas": nodes}
        case Await(node):
            return {
                "action": "wait",
                "node": node,
                "reason": _awaited(model_id, view, node, in_flight),
            }
        case Refuse(error):
            return _refused(error)
        case Place():
            return _placed(model_id, view, found, in_flight)


def _awaited(model_id: str, view: PlanningView, name: str, in_flight: InFlight) -> str:
    """What a load under way is doing, or waits for."""
    node = view.fleet.nodes[name]
    progress = next((each.view.progress for each in view.fleet.engines(model_id, node) if each.view.coming), None)
    message = "" if progress is None else progress.message
    details = [text for text in (message, leaving_text(view.fleet, node, in_flight)) if text]
    return ": ".join(["being loaded there", *(["; ".join(details)] if details else [])])


def _with_leaving(reason: str, view: PlanningView, node: str, in_flight: InFlight) -> str:
    """With what the models that leave the node still have to do."""
    leaving = leaving_text(view.fleet, view.fleet.nodes[node], in_flight)
    return f"{reason}, but first: {leaving}" if leaving else reason


def _placed(model_id: str, view: PlanningView, found: list[NodeVerdict], in_flight: InFlight) -> dict[str, Any]:
    under_way = view.fleet.reservation_of(model_id)
    if under_way is not None:
        reason = _with_leaving("cortex is loading it there", view, under_way.node, in_flight)
        return {"action": "wait", "node": under_way.node, "reason": reason}
    plan = best_plan(found)
    if plan is not None:
        because = plan.eviction_plan.waits_because(view.now)
        return {
            "action": "load",
            "node": plan.node,
            **({} if plan.variant is None else {"variant": plan.variant}),
            "reason": f"{plan.reason}; {because}" if because else plan.reason,
            "devices": list(plan.gpus),
            "devices_because": _why_devices(view, plan),
            "vram_mb_per_device": plan.device_share_mb,
            **_split(_choice(view, plan), plan),
            **_parts(plan),
            "begins_in_secs": round(max(0.0, plan.ready_at - view.now, plan.starts.remaining_secs), 1),
            **_load_details(view, plan),
        }
    reasons = [f"{verdict.node} {verdict.reason}" for verdict in found if verdict.temporary]
    if reasons:
        return {"action": "wait", "reason": "; ".join(reasons)}
    return _refused(placement_error(view, model_id, found))


def _parts(plan: LoadPlan) -> dict[str, Any]:
    """For an engine that spans several neurons, its parts by rank."""
    if not plan.parts:
        return {}
    parts = [{"node": part.node, "devices": list(part.gpus)} for part in (plan, *plan.parts)]
    return {"parts": parts, "network": plan.network or None}


def _choice(view: PlanningView, plan: LoadPlan) -> ModelProfile | None:
    """The model as the plan loads it: in one of its variants."""
    profile = view.profile(plan.model_id)
    return None if profile is None else profile.choice(plan.variant)


def _split(profile: ModelProfile | None, plan: LoadPlan) -> dict[str, Any]:
    """How the model is split over the plan's devices; `parallel` only where the tensor-parallel size does not say
    all."""
    if plan.whole is not None:
        return {"tensor_parallel": plan.whole.tensor, "parallel": plan.whole.model_dump()}
    if profile is None or profile.parallelism.tensor_only:
        return {"tensor_parallel": len(plan.devices) if len(plan.devices) > 1 else None}
    return {"tensor_parallel": profile.tensor_parallel, "parallel": profile.parallelism.model_dump()}


def _refused(error: ServiceError) -> dict[str, Any]:
    return {
        "action": "refuse",
        "reason": error.message,
        "code": error.code,
        "status": error.status,
        "retry_after": error.retry_after,
    }


def _load_details(view: PlanningView, plan: LoadPlan) -> dict[str, Any]:
    """Expected time and evictions of the plan."""
    return {
        "expected_load_secs": None if plan.expected_secs is None else round(plan.expected_secs, 1),
        "evict": [each.resident.key.model_id for each in plan.eviction_plan.evictions],
        "evictions": [
            {
                "model": each.resident.key.model_id,
                "frees_mb_per_device": each.resident.frees_mb,
                "devices": sorted(each.resident.devices - {RAM}),
                "priority": each.resident.priority,
                "in_flight": each.resident.in_flight,
                "state": _STATE_LABELS[each.eviction_class],
                "idle_secs": round(view.now - each.resident.last_used, 1) if each.resident.last_used else None,
                "reload_cost": round(each.resident.cost, 3),
            }
            for each in plan.eviction_plan.evictions
        ],
    }


def _why_devices(view: PlanningView, plan: LoadPlan) -> str:
    """Free memory of each device, how they are connected, and which devices are busy with other starts."""
    node = view.fleet.nodes[plan.node]
    starts = starts_by_device(view, node, plan.model_id)
    busy = "".join(
        f"; device {index} is starting {', '.join(each.models)} for about {math.ceil(each.remaining_secs)} s more"
        for index, each in sorted(starts.items())
    )
    memory = device_memory(view, node)
    free = ", ".join(
        f"{'RAM' if index == RAM else f'device {index}'} has {memory[index].free_text} free"
        for index in plan.devices
        if index in memory
    )
    if len(plan.devices) == 1:
        return free + busy
    profile = _choice(view, plan)
    split = None if profile is None else profile.parallelism
    tensor = len(plan.devices) if split is None or split.tensor_only else split.tensor
    groups = tensor_groups(plan.devices, tensor)
    pairs = [tuple(sorted(pair)) for group in groups for pair in combinations(group, 2)]
    if not pairs:
        return free + busy
    kinds = [node.links[a, b].kind if (a, b) in node.links else None for a, b in pairs]
    worst = max(kinds, key=lambda kind: len(LinkKind) if kind is None else list(LinkKind).index(kind))
    listed = ", ".join("+".join(map(str, group)) for group in groups)
    what = f"tensor groups {listed} connected" if len(groups) > 1 else "connected"
    return f"{free}; {what} by {'an unknown path' if worst is None else worst.value}{busy}"


def _pause_secs(model_id: str, profile: ModelProfile | None, view: PlanningView, node: NodeSnapshot) -> float | None:
    """For how long the model is not loaded on the node after a failure, or because an operator holds it back."""
    model_id = model_id if profile is None else profile.id
    backoff, held_until = view.backoff(model_id, node.name), view.held_until(model_id, node.name)
    ends = [] if backoff is None else [backoff.until]
    ends += [] if held_until is None else [held_until]
    names = [] if profile is None else [each.requested.name for each in feasible_choices(profile, node)]
    of_variants = [view.backoff(name, node.name) for name in names]
    failed = [each.until for each in of_variants if each is not None]
    ends += [min(failed)] if failed and len(failed) == len(names) else []
    return round(max(ends) - view.now, 1) if ends else None


def _variant(profile: ModelProfile | None, verdict: NodeVerdict | None) -> dict[str, Any]:
    """For a model with variants: the one that the node would get, and the better ones with the reasons against them."""
    if profile is None or verdict is None or (profile.variant is None and not profile.variants):
        return {}
    return {
        "variant": None if verdict.plan is None else verdict.plan.variant,
        "passed_over": [{"variant": variant, "reason": reason} for variant, reason in verdict.passed_over],
    }


def _status(fleet: FleetSnapshot, node: NodeSnapshot, model_id: str) -> str | None:
    """The status of the model's engine there; of several, one that serves, else one that may serve soon."""
    views = sorted(
        (engine.view for engine in fleet.engines(model_id, node)),
        key=lambda view: (not view.loaded, not view.coming, not view.holds_devices),
    )
    return views[0].status if views else None


def _node(
    model_id: str,
    profile: ModelProfile | None,
    view: PlanningView,
    node: NodeSnapshot,
    verdict: NodeVerdict | None,
    *,
    possible: bool,
) -> dict[str, Any]:
    plan, capacities = None if verdict is None else verdict.plan, device_memory(view, node)
    return {
        "node": node.name,
        "healthy": node.healthy,
        "draining": node.draining,
        "sick_devices": {str(index): why for index, why in node.sick_devices.items()},
        "status": _status(view.fleet, node, model_id),
        "instances": [
            {
                "instance": engine.key.instance,
                "status": engine.view.status,
                "devices": list(engine.view.devices),
                "variant": engine.view.variant,
                "error": engine.view.failed_because,
            }
            for engine in view.fleet.engines(model_id, node)
        ],
        "feasible": possible and node.discovery is not None,
        **_variant(profile, verdict),
        "fits": None if plan is None else _FIT_LABELS[plan.fit],
        "devices": [] if plan is None else list(plan.gpus),
        "devices_because": None if plan is None else _why_devices(view, plan),
        "spare_mb": None if plan is None or not plan.memory_known else plan.spare_mb,
        "free_mb": {str(index): memory.told_mb for index, memory in capacities.items() if index != RAM},
        "free_ram_mb": capacities[RAM].told_mb if RAM in capacities else None,
        "evict": [] if plan is None else [each.resident.key.model_id for each in plan.eviction_plan.evictions],
        "expected_load_secs": None if plan is None else plan.expected_secs,
        "retry_in_secs": _pause_secs(model_id, profile, view, node),
        "reason": "not in the catalogue" if verdict is None else verdict.reason,
    }
