"""`GET /v1/models`: what clients may ask for."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from cortex.catalogue import Catalogue, ModelProfile
from cortex.keys import PARTS
from cortex.placement import is_feasible
from cortex.snapshot import FleetSnapshot
from shared.errors import NotFound
from shared.protocol import ModelStatus

OWNER = "cortex"


async def list_models(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    entries = model_entries(parts.catalogue, parts.fleet.snapshot(), created=parts.created)
    return web.json_response({"object": "list", "data": list(entries.values())})


async def show_model(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    model_id = request.match_info["model_id"]
    entry = model_entries(parts.catalogue, parts.fleet.snapshot(), created=parts.created).get(model_id)
    if entry is None:
        raise NotFound(f"the model {model_id!r} does not exist", code="model_not_found", param="model")
    return web.json_response(entry)


def model_entries(catalogue: Catalogue, fleet: FleetSnapshot, *, created: int) -> dict[str, dict[str, Any]]:
    """The union of (catalogue x topologies that can hold it) and what is loaded anywhere, then the aliases; by id.

    `feasible_on` speaks of topology, which does not change when a neuron is away for a moment: a model does not
    vanish from the list because its host restarts.
    """
    entries: dict[str, dict[str, Any]] = {}
    for profile in catalogue.models:
        feasible_on = [node.name for node in fleet.nodes.values() if is_feasible(profile, node)]
        if feasible_on or _loaded_on(profile.id, fleet):
            entries[profile.id] = _entry(profile.id, profile, feasible_on, fleet, created)
    for model_id in fleet.listed_models:
        if model_id not in entries and _loaded_on(model_id, fleet):
            entries[model_id] = _entry(model_id, catalogue.profile(model_id), [], fleet, created)
    for alias, target in catalogue.aliases.items():
        if target in entries:
            entries[alias] = {**entries[target], "id": alias, "alias_of": target}
    return entries


def _entry(
    model_id: str, profile: ModelProfile | None, feasible_on: list[str], fleet: FleetSnapshot, created: int
) -> dict[str, Any]:
    limit = None if profile is None else profile.limit
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "loaded": bool(_loaded_on(model_id, fleet)),
        "feasible_on": feasible_on,
        "locations": [
            {
                "node": node.name,
                "status": node.models[model_id].status,
                "vram_estimate_mb": node.models[model_id].vram_used_mb or (profile.vram_mb if profile else None),
            }
            for node in fleet.holders(model_id)
            if node.healthy
        ],
        "limit": None if limit is None else limit.model_dump(exclude_none=True),
        "max_model_len": None if limit is None else limit.context,
        "harness": None if profile is None else profile.harness,
        "quant": None if profile is None else profile.quant,
        "pinned_on": [] if profile is None else list(profile.pinned_on),
    }


def _loaded_on(model_id: str, fleet: FleetSnapshot) -> list[str]:
    return [
        node.name for node in fleet.holders(model_id) if node.healthy and node.status_of(model_id) is ModelStatus.LOADED
    ]
