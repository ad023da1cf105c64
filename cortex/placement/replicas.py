"""Replica reconciliation: adds and removes replicas as the catalogue and the load require. Pure.

A model that was evicted for another one comes back ahead of its requests, as soon as idle models hold memory with which
it would save clearly more waiting than they do. What a model saves is what its sessions would wait if each began with a
load: how often they begin, times the wait for a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from cortex.config.profile import ModelProfile
from cortex.fleet.groups import serving_engine, sick_because
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot
from cortex.placement.capacity import ResidentModel, estimated_load_secs
from cortex.placement.eviction import EvictionClass
from cortex.placement.fair_queue import after_start, is_served_or_loading
from cortex.placement.inputs import NO_ARRIVALS, PlanningView, ReplicaUsage
from cortex.placement.instances import coming, instances_on
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.planner import NodeVerdict, best_plan, candidate_verdicts, evaluate_node
from cortex.routing.replica import ReplicaKey
from shared.protocol import ModelStatus

MAX_AT_ONCE = 64
"""How many replicas are added in one pass; a pass follows every second."""
MAX_SHARED_OUT = 16
"""The same while several models lack some: each of these replicas is planned on its own."""
LOAD_AHEAD_FACTOR = 1.5
"""A model comes back ahead of its requests if it saves this many times as much waiting as what is evicted for it."""
LOAD_AHEAD_IDLE_SECS = 60.0
"""Nothing is evicted for it that was used or loaded this recently."""
MAX_LOAD_AHEAD = 4
"""How many models are considered in one pass, those that save most."""
IN_USE_SECS = 60.0
"""A model used this recently moves to another place when its neuron is drained or its device is sick."""

RemovalKind: TypeAlias = Literal["idle", "surplus", "sick_device"]


@dataclass(frozen=True)
class ReplicaRemoval:
    """A replica that is no longer needed, with the reason in words. `sleep`: it stays in host memory."""

    model_id: str
    node: str
    instance: str
    sleep: bool
    kind: RemovalKind
    reason: str

    @property
    def key(self) -> ReplicaKey:
        return ReplicaKey(self.model_id, self.node, self.instance)


@dataclass(frozen=True)
class ReplicaChanges:
    """Loads to start, each with its reason, and replicas to remove."""

    loads: tuple[tuple[LoadPlan, str], ...] = ()
    removals: tuple[ReplicaRemoval, ...] = ()


def needs_reconciliation(profile: ModelProfile, fleet: FleetSnapshot) -> bool:
    """Whether the model's replicas may change without requests. An adapter has none of its own."""
    if profile.base is not None:
        return False
    if profile.replicas.min > 0 or profile.replicas.max > 1 or profile.idle_ttl_secs is not None:
        return True
    holders = fleet.holders(profile.id)
    loaded = sum(view.loaded for node in holders for view in node.instances(profile.id).values())
    return loaded > 1 or any(node.draining or node.sick_devices for node in holders)


def reconcile_replicas(view: PlanningView, profiles: Iterable[ModelProfile]) -> ReplicaChanges:
    """The changes due now for these models of the catalogue."""
    wanted = list(profiles)
    loads = _missing_from_minimums(view, wanted)
    for plan, _ in loads:
        view = after_start(view, plan)
    removals: list[ReplicaRemoval] = []
    for profile in wanted:
        additions = _replicas_to_add(view, profile)
        for plan, _ in additions:
            view = after_start(view, plan)
        loads += additions
        removals += _on_sick_devices(view, profile) or _replicas_to_remove(view, profile)
    return ReplicaChanges((*loads, *_loads_ahead(view)), tuple(removals))


def _missing_from_minimums(view: PlanningView, profiles: Iterable[ModelProfile]) -> list[tuple[LoadPlan, str]]:
    """What is missing from every `replicas.min`, all of it at once. Models that lack some share the devices: the
    highest priority goes first, then the model with the fewest replicas, then the one that needs the most devices,
    because few places are left for it later."""
    present = {profile.id: _present(view, profile) for profile in profiles if profile.replicas.min}
    short = [profile for profile in profiles if len(present.get(profile.id, ())) < profile.replicas.min]
    loads: list[tuple[LoadPlan, str]] = []
    counts = {profile.id: len(present[profile.id]) for profile in short}
    while short and len(loads) < (MAX_AT_ONCE if len(short) == 1 else MAX_SHARED_OUT):
        profile = min(short, key=lambda each: (-each.residency_priority, counts[each.id], -each.device_count, each.id))
        missing = profile.replicas.min - counts[profile.id]
        why = f"replicas.min is {profile.replicas.min}, {len(view.replicas(profile.id))} serving"
        count = min(missing, MAX_AT_ONCE - len(loads)) if len(short) == 1 else 1
        found = _over_idle(view, profile, why, count=count)
        for plan, _ in found:
            view = after_start(view, plan)
        loads += found
        counts[profile.id] += len(found)
        if len(found) < count or counts[profile.id] >= profile.replicas.min:
            short.remove(profile)
    return loads


def _present(view: PlanningView, profile: ModelProfile) -> set[ReplicaKey]:
    """Its replicas, those that are being loaded included."""
    return {*view.replicas(profile.id), *coming(view, profile.id)}


def _replicas_to_add(view: PlanningView, profile: ModelProfile) -> list[tuple[LoadPlan, str]]:
    """A replica where another would help; one at a time, and none while some are missing from the minimum."""
    serving = view.replicas(profile.id)
    starting = coming(view, profile.id) - serving
    if len(serving) + len(starting) < profile.replicas.min:
        return []
    if starting:
        return []
    if not serving:
        return _replacement_for_leaving(view, profile)
    since = view.overloaded_since.get(profile.id)
    if len(serving) < profile.replicas.max and since is not None and view.now - since >= view.rules.scale_up_secs:
        why = f"each of {len(serving)} replicas has more than {view.rules.replica_target} requests"
        return _in_free_memory(view, profile, why)
    return []


def _in_free_memory(view: PlanningView, profile: ModelProfile, why: str) -> list[tuple[LoadPlan, str]]:
    """The best place that needs no eviction: first in the variant that each node would get, then in any other, best
    first, on devices without an instance of the model."""
    found = _over_idle(view, profile, why, worst=Fit.NOW)
    for choice in profile.choices if profile.variants and not found else ():
        for plan, _ in _over_idle(view, choice, why, worst=Fit.NOW):
            if instances_on(view, profile.id, view.fleet.nodes[plan.node]).devices.isdisjoint(plan.devices):
                return [(plan, why)]
    return found


def _replacement_for_leaving(view: PlanningView, profile: ModelProfile) -> list[tuple[LoadPlan, str]]:
    """A new place for a model in use that is served only by drained neurons, so that those can empty, or on sick
    devices."""
    leaving = view.fleet.serving(profile.id)
    if not any(_is_in_use(view, engine) for engine in leaving):
        return []
    sick = (f"{engine.node.name}, {why}" for engine in leaving if (why := sick_because(view.fleet, engine)) is not None)
    why = next(sick, None)
    if why is not None:
        return _over_idle(view, profile, f"in use on a sick device ({why})")
    names = ", ".join(sorted({engine.node.name for engine in leaving}))
    return _over_idle(view, profile, f"in use on drained neurons only ({names})")


def _is_in_use(view: PlanningView, engine: EngineSnapshot) -> bool:
    return bool(view.requests_on(engine)) or view.now - view.usage(engine.key).last_used < IN_USE_SECS


def _over_idle(
    view: PlanningView, profile: ModelProfile, why: str, *, count: int = 1, worst: Fit = Fit.AFTER_EVICTION
) -> list[tuple[LoadPlan, str]]:
    """The best places for up to `count` replicas, each after those before it, that evict only idle models: none in use,
    none recently loaded, none likely to be used soon."""
    found: list[tuple[LoadPlan, str]] = []
    verdicts: dict[str, NodeVerdict] = {}
    while len(found) < count:
        known = bool(verdicts)
        if not known:
            verdicts = {verdict.node: verdict for verdict in candidate_verdicts(view, profile)}
        plan = best_plan(verdicts.values())
        if plan is None or plan.fit > worst or not _evicts_only_idle(plan, view.now):
            if not known:
                break
            verdicts = {}  # other candidates of a large fleet may still do
            continue
        found.append((plan, why))
        view = after_start(view, plan)
        # What evictions leave of a model may protect others of it elsewhere.
        if plan.eviction_plan.evictions or plan.parts:
            verdicts = {}
        else:
            verdicts[plan.node] = evaluate_node(view, profile, view.fleet.nodes[plan.node])
    return found


def _loads_ahead(view: PlanningView) -> list[tuple[LoadPlan, str]]:
    """At most one model to load ahead of its requests: the one that saves most. None while requests wait for memory."""
    queued = any(not is_served_or_loading(view, model_id) for model_id in view.waiting)
    if queued or not view.rules.load_ahead:
        return []
    found = [(_wait_rate(view, profile), profile) for profile in map(view.catalogue.profile, view.displaced) if profile]
    wanted = [(rate, each) for rate, each in found if rate and not is_served_or_loading(view, each.id)]
    wanted.sort(key=lambda pair: (-pair[0], pair[1].id))
    view = replace(view, usages={key: _in_use_if_recent(view.now, use) for key, use in view.usages.items()})
    best: tuple[float, LoadPlan] | None = None
    for rate, profile in wanted[:MAX_LOAD_AHEAD]:
        if best is not None and rate <= best[0]:
            break  # no later one can save more
        plan = best_plan(candidate_verdicts(view, profile))
        if plan is None or plan.fit > Fit.AFTER_EVICTION or not _evicts_only_idle(plan, view.now):
            continue
        lost = sum(_lost_rate(view, each.resident) for each in plan.eviction_plan.evictions)
        gain = rate - LOAD_AHEAD_FACTOR * lost
        if gain > (0.0 if best is None else best[0]):
            best = gain, plan
    return [] if best is None else [(best[1], "it was evicted, and is used more than what is idle now")]


def _in_use_if_recent(now: float, use: ReplicaUsage) -> ReplicaUsage:
    """Of a replica that was used or loaded recently, the same with a request."""
    recent = max(use.last_used, use.loaded_at) > now - LOAD_AHEAD_IDLE_SECS
    return replace(use, in_flight=max(1, use.in_flight)) if recent else use


def _wait_rate(view: PlanningView, profile: ModelProfile) -> float:
    """The waiting that loading the model would save, in seconds a second. 0 if it would be unloaded as idle at once."""
    arrivals, ttl = view.arrivals.get(profile.id, NO_ARRIVALS), profile.idle_ttl_secs
    if ttl is not None and view.now - arrivals.last >= ttl:
        return 0.0
    known = view.load_secs.get(profile.id)
    secs = min(known.values()) if known else estimated_load_secs(view, profile.id, "", profile.vram_mb or 0)
    return arrivals.wait_rate(view.now, secs)


def _lost_rate(view: PlanningView, resident: ResidentModel) -> float:
    """The waiting that evicting a replica would cause, in seconds a second; a replica among several costs its share."""
    model_id = resident.key.model_id
    arrivals = view.arrivals.get(model_id, NO_ARRIVALS)
    return arrivals.wait_rate(view.now, resident.reload_secs) / max(1, len(view.replicas(model_id)))


def _evicts_only_idle(plan: LoadPlan, now: float) -> bool:
    return plan.eviction_plan.eviction_class is EvictionClass.IDLE and plan.ready_at <= now


def _on_sick_devices(view: PlanningView, profile: ModelProfile) -> list[ReplicaRemoval]:
    """The engines on sick devices that are not needed: another one serves the model, or they sleep, or they are not in
    use and there is another place for the model. Their requests finish first. One that nothing can replace stays: it
    may still work."""
    found = []
    replaced = bool(view.replicas(profile.id))
    for engine in view.fleet.engines(profile.id) if any(node.sick_devices for node in view.fleet.healthy) else ():
        why = engine.sick_because
        if why is None or not engine.node.healthy or engine.key in view.fleet.evicting:
            continue
        asleep = engine.view.known_status is ModelStatus.SLEEPING
        idle = (
            engine.view.loaded and not profile.replicas.min and not _is_in_use(view, serving_engine(view.fleet, engine))
        )
        if asleep or (engine.view.loaded and replaced) or (idle and _over_idle(view, profile, "")):
            found.append(ReplicaRemoval(*engine.key, False, "sick_device", why))
    return found


def _replicas_to_remove(view: PlanningView, profile: ModelProfile) -> Iterator[ReplicaRemoval]:
    """Replicas idle for too long, least recently used first, down to the minimum."""
    if any(name in view.waiting for name in view.catalogue.names_of(profile.id)):
        return
    serving = view.fleet.serving(profile.id)
    idle = sorted((view.now - _last_used_at(view, engine.key), engine.key) for engine in serving)[::-1]
    left = len(serving)
    working = {engine.key: view.requests_on(engine) for engine in serving}
    total, surplus_secs = sum(working.values()), _surplus_idle_secs(view, serving)
    for idle_secs, key in idle:
        if left <= profile.replicas.min or working[key]:
            continue
        ttl = profile.idle_ttl_secs
        if ttl is not None and idle_secs >= ttl:
            left -= 1
            yield ReplicaRemoval(*key, profile.when_idle == "sleep", "idle", f"idle for {idle_secs:.0f} s")
        elif left > profile.replicas.max and idle_secs >= surplus_secs:
            why = f"one of {left} replicas, replicas.max is {profile.replicas.max}; idle for {idle_secs:.0f} s"
            left -= 1
            yield ReplicaRemoval(*key, False, "surplus", why)
        elif profile.replicas.max > 1 and left > 1 and idle_secs >= view.rules.scale_down_secs:
            if total > view.rules.replica_target * (left - 1):
                continue  # the remaining load would bring it back
            left -= 1
            yield ReplicaRemoval(*key, False, "surplus", f"one of {left + 1} replicas, idle for {idle_secs:.0f} s")


def _surplus_idle_secs(view: PlanningView, serving: Iterable[EngineSnapshot]) -> float:
    """How long a replica above the maximum must be idle to be removed. Requests spread over all replicas: once all have
    been there for `scale_down_secs`, a pause is enough. Before that, a neuron that goes down and comes back again and
    again would cause a load each time."""
    newest = max((view.usage(engine.key).loaded_at for engine in serving), default=0.0)
    settled = view.now - newest >= view.rules.scale_down_secs
    return min(view.rules.pause_secs, view.rules.scale_down_secs) if settled else view.rules.scale_down_secs


def _last_used_at(view: PlanningView, key: ReplicaKey) -> float:
    use = view.usage(key)
    return max(use.last_used, use.loaded_at)
