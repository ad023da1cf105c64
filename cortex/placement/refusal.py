"""The error a client gets when its model cannot be placed now. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from cortex.config.catalogue import Catalogue
from cortex.config.durations import duration_text
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.feasibility import feasible_choices, infeasible_reason, possible_nodes
from cortex.placement.inputs import PlanningView
from cortex.placement.planner import NodeVerdict
from shared.errors import MAX_SHOWN_CHARS, Conflict, NotFound, ServiceError, Unavailable, shortened
from shared.protocol import ErrorCode, ModelStatus
from shared.retry_after import MEMORY_TAKEN_SECS, NEURON_DOWN_SECS, until_retry

NO_NEURON: Final = "no neuron is known: add [[neurons]] to cortex.toml, or see [discovery] there"
MAX_COMPARED: Final = 300
"""Names that an unknown one is compared with: a client must not keep cortex busy with guesses."""


def placement_error(view: PlanningView, model_id: str, found: Sequence[NodeVerdict]) -> ServiceError:
    """Why no node takes the model, given the verdict on each."""
    profile, fleet = view.catalogue.profile(model_id), view.fleet
    backoffs = view.backoffs_of(model_id)
    held = held_back_error(view, model_id)
    if held is not None or (profile is None and not backoffs):
        return held or unknown_model_error(model_id, view.catalogue, fleet)
    if not fleet.healthy:
        return no_healthy_neurons_error(fleet)
    possible = list(fleet.nodes.values())
    if profile is not None:
        possible = possible_nodes(profile, fleet)
        if not possible:
            return _infeasible(profile, fleet)
    if backoffs:
        first = min(backoffs, key=lambda backoff: backoff.until)
        return Unavailable(
            first.reason,
            code=ErrorCode.COLD_LOAD_FAILED,
            retry_after=until_retry(first.until, view.now),
            permanent=bool(possible) and all(_fails_on(node, model_id, view) for node in possible),
        )
    names = {node.name for node in possible}
    profile_spans = profile is not None and profile.span_nodes
    present = [node for node in possible if node.healthy and node.discovery is not None and not node.draining]
    if not present:
        away = "; ".join(f"{node.name}: {_absence(node)}" for node in possible)
        return Unavailable(
            f"the model {model_id!r} can only run on neurons that are unavailable ({away})",
            code=ErrorCode.NEURON_UNAVAILABLE,
            retry_after=NEURON_DOWN_SECS,
        )
    reasons = "; ".join(
        f"{verdict.node}: {verdict.reason}" for verdict in found if verdict.node in names or profile_spans
    )
    return _unservable(profile.id if profile is not None else model_id, possible) or Unavailable(
        f"not enough memory for the model {model_id!r} now ({reasons})",
        code=ErrorCode.INSUFFICIENT_VRAM,
        retry_after=MEMORY_TAKEN_SECS,
    )


def node_refusal_error(model_id: str, verdict: NodeVerdict) -> Conflict:
    """The error for an operator who wants the model on this node."""
    message = f"{verdict.node} cannot load {model_id!r} now: {verdict.reason}"
    return Conflict(message, code=ErrorCode.INSUFFICIENT_VRAM, param="node")


def held_back_error(view: PlanningView, model_id: str) -> ServiceError | None:
    """The error for a model that an operator holds back on every neuron that could load it now, else None."""
    profile = view.profile(model_id)
    if profile is None:
        return None
    usable = [node for node in possible_nodes(profile, view.fleet) if node.healthy and not node.draining]
    ends = [until for node in usable if (until := view.held_until(profile.id, node.name)) is not None]
    if not ends or len(ends) < len(usable):
        return None
    left = min(ends) - view.now
    return Unavailable(
        f"an operator has unloaded the model {model_id!r} and holds it back for another {duration_text(left)}; "
        f"`cortex load {model_id}` ends that",
        code=ErrorCode.UNAVAILABLE,
        retry_after=left,
    )


def _fails_on(node: NodeSnapshot, model_id: str, view: PlanningView) -> bool:
    """True if the model failed on the node in every form that the node may hold, and would fail again."""
    profile = view.catalogue.profile(model_id)
    forms = [] if profile is None else [each.requested.name for each in feasible_choices(profile, node)]
    failed = [view.backoff(name, node.name) for name in forms]
    of_all = view.backoff(model_id if profile is None else profile.id, node.name)
    return any(
        found and all(backoff is not None and backoff.permanent for backoff in found) for found in (failed, [of_all])
    )


def unknown_model_error(model_id: str, catalogue: Catalogue, fleet: FleetSnapshot) -> ServiceError:
    """The error for a model that is neither in the catalogue nor servable on a healthy neuron."""
    for node, view, _ in fleet.engines(model_id):
        if not node.healthy:
            return Unavailable(
                f"the model {model_id!r} is on {node.name}, which is {_absence(node)}",
                code=ErrorCode.NEURON_UNAVAILABLE,
                retry_after=NEURON_DOWN_SECS,
            )
        if view.known_status is ModelStatus.FAILED:
            return Unavailable(
                f"the model {model_id!r} failed on {node.name}: {view.error or 'no reason given'}",
                code=ErrorCode.COLD_LOAD_FAILED,
                retry_after=NEURON_DOWN_SECS,
            )
        unservable = _unservable(model_id, [node])
        return unservable or Unavailable(
            f"the model {model_id!r} is {view.status!r} on {node.name}",
            code=ErrorCode.NEURON_UNAVAILABLE,
            retry_after=NEURON_DOWN_SECS,
        )
    if not fleet.healthy and any(node.discovery is None for node in fleet.nodes.values()):
        return no_healthy_neurons_error(fleet)  # a neuron that has never answered may have the model
    names = [*(profile.id for profile in catalogue.models), *catalogue.aliases, *fleet.listed_models]
    return no_such_model_error(model_id, names, catalogue)


def no_such_model_error(model_id: str, names: Iterable[str], catalogue: Catalogue) -> NotFound:
    """The error for a name that is not among the `names` of models, with those it may have meant."""
    meant = catalogue.model_meant_by(model_id)
    close = [] if meant is not None else _close_names(model_id, islice(names, MAX_COMPARED))
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    hint = hint if meant is None else f": {meant.variants_text}."
    message = f"the model {shortened(model_id)!r} does not exist{hint} GET /v1/models lists all models"
    return NotFound(message, code=ErrorCode.MODEL_NOT_FOUND, param="model")


def _close_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `wanted`, with or without the owner before the slash."""
    if len(wanted) > MAX_SHOWN_CHARS:
        return []
    by_form: dict[str, str] = {}
    for name in names:
        by_form.setdefault(name.lower().rpartition("/")[2], name)
        by_form.setdefault(name.lower(), name)
    forms = [*difflib.get_close_matches(wanted.lower(), by_form, n=3)]
    forms += difflib.get_close_matches(wanted.lower().rpartition("/")[2], by_form, n=3)
    return list(dict.fromkeys(by_form[form] for form in forms))[:3]


def _unservable(model_id: str, nodes: Iterable[NodeSnapshot]) -> ServiceError | None:
    """The error for a model that is loaded on some of these nodes and cannot answer there now."""
    reasons = [
        f"{node.name}: {why}"
        for node in nodes
        if node.healthy
        for view in node.instances(model_id).values()
        if view.loaded and (why := view.unservable_because) is not None
    ]
    if not reasons:
        return None
    return Unavailable(
        f"the model {model_id!r} is loaded and cannot answer now ({'; '.join(reasons)})",
        code=ErrorCode.NEURON_UNAVAILABLE,
        retry_after=NEURON_DOWN_SECS,
    )


def no_healthy_neurons_error(fleet: FleetSnapshot) -> ServiceError:
    why = "; ".join(f"{node.name}: {_absence(node)}" for node in fleet.nodes.values())
    message = f"no neuron is healthy ({why})" if why else NO_NEURON
    return Unavailable(message, code=ErrorCode.NO_HEALTHY_NEURONS, retry_after=NEURON_DOWN_SECS)


def _infeasible(profile: ModelProfile, fleet: FleetSnapshot) -> ServiceError:
    reasons = "; ".join(f"{node.name}: {infeasible_reason(profile, node)}" for node in fleet.nodes.values())
    return NotFound(
        f"no neuron can hold the model {profile.requested.name!r} ({reasons})",
        code=ErrorCode.NO_FEASIBLE_NEURON,
        param="model",
    )


def _absence(node: NodeSnapshot) -> str:
    if node.healthy:
        return "draining"
    if node.last_error is None:
        return "not reached yet"
    return f"down: {node.last_error}"
