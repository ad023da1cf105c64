"""Why a model is, or would be, where it is. Pure: the very functions that decide, with their reasons kept."""

from __future__ import annotations

from typing import Any

from cortex.catalogue import Catalogue, ModelProfile
from cortex.placement import candidate_on, infeasible_reason
from cortex.routing import Await, InFlight, Load, Refuse, Serve, decide
from cortex.snapshot import FleetSnapshot, NodeSnapshot


def explain(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot, in_flight: InFlight) -> dict[str, Any]:
    """What a request for the model would do now, and each node with the reason it fits or not. Memory in MiB."""
    profile = catalogue.profile(model_id)
    return {
        "model": model_id,
        "in_catalogue": profile is not None,
        "decision": _decision(model_id, catalogue, fleet, in_flight),
        "nodes": [_node(model_id, profile, fleet, node) for node in fleet.nodes.values()],
    }


def _decision(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot, in_flight: InFlight) -> dict[str, Any]:
    match decide(model_id, catalogue, fleet, in_flight):
        case Serve(nodes):
            return {"action": "serve", "node": nodes[0], "reason": "loaded there", "replicas": list(nodes)}
        case Await(node):
            return {"action": "wait", "node": node, "reason": "on its way there"}
        case Load(node, command, share_mb, reason):
            return {
                "action": "load",
                "node": node,
                "reason": reason,
                "devices": command.devices,
                "vram_mb_per_device": share_mb,
                "tensor_parallel": command.tensor_parallel,
                "evict": [],
            }
        case Refuse(error):
            return {"action": "refuse", "reason": error.message, "code": error.code, "status": error.status}


def _node(model_id: str, profile: ModelProfile | None, fleet: FleetSnapshot, node: NodeSnapshot) -> dict[str, Any]:
    view = node.models.get(model_id)
    entry: dict[str, Any] = {
        "node": node.name,
        "healthy": node.healthy,
        "draining": node.draining,
        "status": None if view is None else view.status,
        "feasible": False,
        "fits": None,
        "devices": [],
        "spare_mb": None,
    }
    if profile is None:
        return {**entry, "reason": "not in the catalogue"}
    if node.discovery is None:
        return {**entry, "reason": f"not reached yet: {node.last_error or 'no answer so far'}"}
    infeasible = infeasible_reason(profile, node)
    if infeasible is not None:
        return {**entry, "reason": infeasible}
    candidate = candidate_on(profile, fleet, node)
    return {
        **entry,
        "feasible": True,
        "fits": candidate.fit.name.lower(),
        "devices": list(candidate.devices),
        "spare_mb": candidate.spare_mb,
        "reason": candidate.reason if node.healthy else f"down now: {node.last_error}",
    }
