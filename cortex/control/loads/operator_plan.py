"""Where an operator's load goes, and what operators' actions would do, in sentences. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import EngineSnapshot
from cortex.placement.inputs import PlanningView, WaitingRequests
from cortex.placement.instances import coming
from cortex.placement.load_plan import LoadPlan
from cortex.placement.planner import all_verdicts, best_plan, plan_variant
from cortex.placement.refusal import held_back_error, node_refusal_error, placement_error
from shared.protocol import ModelStatus
from shared.terminal.wording import counted


def operator_plan(view: PlanningView, name: str, node_name: str | None, instance: str | None = None) -> LoadPlan | None:
    """A load on this neuron or the best one, of this instance or any, which does not wait for its turn. None if the
    model is being loaded there.

    Raises:
        ServiceError: it cannot be placed.
    """
    view = replace(view, waiting={**view.waiting, name: WaitingRequests(1, float("-inf"))})
    profile = view.profile(name) or _failed_profile(view, name, node_name)
    if profile is None:
        raise placement_error(view, name, ())
    if node_name is None:
        if view.fleet.loading_on(name) is not None:
            return None
        found = all_verdicts(view, profile)
        plan = best_plan(found)
        if plan is None:
            raise placement_error(view, name, found)
        return plan
    node = view.fleet.nodes[node_name]
    if any(each.view.coming and instance in (None, each.instance) for each in view.fleet.engines(name, node)):
        return None
    if instance is not None:
        model_id = view.catalogue.requested(name).model_id
        view = replace(view, named_instances={(model_id, node_name): instance})
    verdict = plan_variant(view, profile, node)
    if verdict.plan is None:
        raise node_refusal_error(name, verdict)
    return verdict.plan


def _failed_profile(view: PlanningView, name: str, node_name: str | None) -> ModelProfile | None:
    """A model known only to neurons may be loaded again after a failure."""
    known = [
        node
        for node in view.fleet.holders(name)
        if node.healthy and node_name in (None, node.name) and node.has_status(name, ModelStatus.FAILED)
    ]
    return view.profile_from_nodes(name, known)


def without_pauses(view: PlanningView, name: str) -> PlanningView:
    """As an operator's load finds it, which ends back-offs and holds of the model."""
    model_id = view.catalogue.requested(name).model_id
    names = {model_id, *view.catalogue.names_of(model_id)}
    backoffs = {key: backoff for key, backoff in view.backoffs.items() if key[0] not in names}
    holds = {key: until for key, until in view.holds.items() if key[0] not in names}
    return replace(view, backoffs=backoffs, holds=holds)


def without_engine(view: PlanningView, engine: EngineSnapshot) -> PlanningView:
    """As it is once the engine has ended, except that the memory it holds does not count as free."""
    node, models = engine.node, dict(engine.node.models)
    left = {name: each for name, each in node.instances(engine.view.id).items() if name != engine.instance}
    if left:
        models[engine.view.id] = left
    else:
        models.pop(engine.view.id, None)
    nodes = {**view.fleet.nodes, node.name: replace(node, models=models)}
    return replace(view, fleet=replace(view.fleet, nodes=nodes, index=None))


def load_effects(plan: LoadPlan | None) -> list[str]:
    """What carrying out the plan would do, None for a load that is under way."""
    if plan is None:
        return ["It is being loaded already."]
    secs = "" if plan.expected_secs is None else f", about {math.ceil(plan.expected_secs)} s"
    effects = [f"On {' + '.join(plan.nodes)}{_gpus(plan.gpus)}{secs}: {plan.fit_reason}."]
    for each in plan.eviction_plan.evictions:
        key, running = each.resident.key, each.resident.in_flight
        after = f", after {counted(running, 'running request')}" if running else ""
        effects.append(f"Displaces {key.model_id} on {key.name}{after}.")
    return effects if plan.displaces else [*effects, "Displaces nothing."]


def end_effects(
    view: PlanningView, engines: Sequence[EngineSnapshot], model_id: str, verb: str, *, drain: bool
) -> list[str]:
    """What becomes of these engines of a model or an adapter: `verb` says what, such as "is unloaded from". And who
    serves it meanwhile."""
    effects = []
    for engine in engines:
        running = view.requests_on(engine)
        how = f"{'is' if running == 1 else 'are'} {'finished first' if drain else 'cut off'}"
        requests = f"{counted(running, 'running request')} {how}" if running else "no request is running there"
        effects.append(f"{model_id} {verb} {engine.key.name}{_gpus(engine.view.devices)}: {requests}.")
    keys = {engine.key for engine in engines}
    others = [engine.key.name for engine in view.fleet.serving(model_id) if engine.key not in keys]
    return [*effects, f"Still served by {', '.join(others)}." if others else "Nothing else serves it."]


def after_end(
    view: PlanningView, engines: Sequence[EngineSnapshot], model_id: str, *, asleep: bool = False
) -> list[str]:
    """Whether cortex loads the model again after the end of these engines, or after they have gone to sleep. Empty if
    enough others serve it, or an operator holds it back."""
    catalogue, ended = view.catalogue, {engine.key for engine in engines}
    if model_id in catalogue.adapters:  # it has no replicas: the next request loads it
        left, least = {engine.key for engine in view.fleet.serving(model_id)} - ended, 0
    else:
        model_id = catalogue.requested(model_id).model_id
        left, profile = {*view.replicas(model_id), *coming(view, model_id)} - ended, catalogue.profile(model_id)
        least = 0 if profile is None else profile.replicas.min
    if held_back_error(view, model_id) is not None:
        return []
    again = "wakes it, or loads it elsewhere" if asleep else "loads it again"
    if len(left) < least:
        return [f"cortex {again}, as soon as there is room, because its replicas.min is {least}."]
    return [] if left else [f"The next request {again}."]


def _gpus(devices: Sequence[int]) -> str:
    return f", GPU {' and '.join(map(str, devices))}" if devices else ""
