"""The policies of a simulation: cortex's planner, and two common policies to compare it with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cortex.config.profile import ModelProfile
from cortex.control.scheduler import PLANNER, Policy
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import ResidentModel, device_memory, resident_models
from cortex.placement.devices import MAX_EVICTION_SETS, device_sets, eligible_devices
from cortex.placement.eviction import Eviction, EvictionClass, EvictionPlan, first_sufficient, free_enough
from cortex.placement.fair_queue import LoadSchedule, after_start, is_served_or_loading
from cortex.placement.feasibility import can_hold_part, is_feasible
from cortex.placement.inputs import PlanningView
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.planner import all_verdicts, plan_together
from cortex.placement.refusal import placement_error
from cortex.placement.replicas import ReplicaChanges
from cortex.placement.spans import Span, spans_of
from shared.errors import ServiceError

Choose = Callable[[PlanningView, Sequence["_DeviceSet"]], LoadPlan | None]
"""Picks one of a model's possible places; None when it has to wait."""
_Holder = tuple[ModelProfile, NodeSnapshot]
"""A model, a variant or a part of it, and a node that could hold that."""


def _first_come_first_served(choose: Choose) -> Policy:
    """Considers the waiting models in order of arrival; each takes the place that `choose` finds, in the first of its
    variants that the node could hold. A model that may span nodes does so if no node has a place for it. Evicts idle
    models only, whatever their priority and age, and never a pinned one. Adds and removes no replicas."""

    def schedule_loads(view: PlanningView) -> LoadSchedule:
        loads: list[LoadPlan] = []
        rejected: dict[str, ServiceError] = {}
        wait_reasons: dict[str, str] = {}
        for model_id in sorted(view.waiting, key=lambda model_id: (view.waiting[model_id].since, model_id)):
            profile = view.catalogue.profile(model_id)
            if profile is None or is_served_or_loading(view, model_id):
                continue
            holders, spans = _holders(view, profile), list(_possible_spans(view, profile))
            if not holders and not spans:
                rejected[model_id] = placement_error(view, model_id, all_verdicts(view, profile))
                continue
            plan = choose(view, list(_device_sets(view, holders))) or _over_several(view, spans, choose)
            if plan is None:
                wait_reasons[model_id] = "waiting for memory"
            else:
                loads.append(plan)
                view = after_start(view, plan)
        return LoadSchedule(tuple(loads), rejected, wait_reasons)

    def reconcile_replicas(view: PlanningView, profiles: Iterable[ModelProfile]) -> ReplicaChanges:
        return ReplicaChanges()

    return Policy(schedule_loads, reconcile_replicas)


def _least_recently_used(view: PlanningView, options: Sequence[_DeviceSet]) -> LoadPlan | None:
    """The place with the most free memory; if none has enough, evicts the least recently used models."""
    with_memory = [option for option in options if not option.missing_mb]
    if with_memory:
        most = max(with_memory, key=lambda option: option.spare_mb)
        return most.plan(-most.spare_mb)
    found: list[tuple[float, _DeviceSet, tuple[Eviction, ...]]] = []
    for option in options:
        evicting = option.choose_evictions(view, _last_used)
        if evicting is not None:
            found.append((max(_last_used(each.resident) for each in evicting), option, evicting))
    if not found:
        return None
    last_used, option, evicting = min(found, key=lambda each: each[0])
    return option.plan(last_used, evicting=evicting)


def _last_used(resident: ResidentModel) -> float:
    return max(resident.last_used, resident.loaded_at)


def _first_fit(view: PlanningView, options: Sequence[_DeviceSet]) -> LoadPlan | None:
    """The first node with enough free memory, by name; if none has, evicts the models loaded first, on the first node
    where that is enough."""
    ordered = sorted(options, key=lambda option: (option.node.name, option.devices))
    for option in ordered:
        if not option.missing_mb:
            return option.plan(option.node.name)
    for option in ordered:
        evicting = option.choose_evictions(view, lambda each: each.loaded_at)
        if evicting is not None:
            return option.plan(option.node.name, evicting=evicting)
    return None


POLICIES: dict[str, Policy] = {
    "planner": PLANNER,
    "lru": _first_come_first_served(_least_recently_used),
    "first-fit": _first_come_first_served(_first_fit),
}


class _DeviceSet:
    """A set of devices of one node, as a possible place for a model."""

    def __init__(self, view: PlanningView, profile: ModelProfile, node: NodeSnapshot, devices: tuple[int, ...]) -> None:
        self.node = node
        self.devices = devices
        self._model_id = profile.id
        self._variant = profile.variant
        self._share_mb = view.device_share_mb(profile)
        self._instance = view.instance_to_load(profile.id, node, profile.variant)
        memory = device_memory(view, node)
        free = {index: memory[index].free_mb for index in devices}
        self.missing_mb = {index: self._share_mb - mb for index, mb in free.items() if mb < self._share_mb}
        self.spare_mb = sum(free.values()) - self._share_mb * len(devices)

    def choose_evictions(
        self, view: PlanningView, age: Callable[[ResidentModel], float]
    ) -> tuple[Eviction, ...] | None:
        """Idle models to evict, oldest first; None when evicting all of them is not enough."""
        idle = [each for each in resident_models(view, self.node) if not each.in_flight and each.protected is None]
        oldest_first = [
            Eviction(each, EvictionClass.IDLE, view.now)
            for each in sorted(idle, key=lambda each: (age(each), each.key))
        ]
        if not free_enough(self.missing_mb, oldest_first):
            return None
        return first_sufficient(self.missing_mb, oldest_first)

    def plan(self, *rank: float | str, evicting: tuple[Eviction, ...] = ()) -> LoadPlan:
        """The plan to load it there. `rank` orders the plans of several nodes that fit equally well."""
        fit = Fit.AFTER_EVICTION if evicting else Fit.NOW
        return LoadPlan(
            model_id=self._model_id,
            node=self.node.name,
            devices=self.devices,
            device_share_mb=self._share_mb,
            fit=fit,
            spare_mb=self.spare_mb,
            reserve_mb=self._share_mb,
            instance=self._instance,
            variant=self._variant,
            rank=(fit, *rank),
            eviction_plan=EvictionPlan(evicting),
        )


def _holders(view: PlanningView, profile: ModelProfile) -> list[_Holder]:
    """The nodes that could hold the model alone, each with the first variant that it could hold."""
    found: list[_Holder] = []
    for node in view.fleet.nodes.values():
        choice = next((each for each in profile.choices if _could_hold(each, node)), None)
        if choice is not None:
            found.append((choice, node))
    return found


def _possible_spans(view: PlanningView, profile: ModelProfile) -> Iterator[tuple[Span, list[_Holder]]]:
    """The ways to spread the model over nodes, best first, each with all nodes that could hold a part."""
    for span in (span for choice in profile.choices for span in spans_of(choice)):
        nodes = [
            node
            for node in view.fleet.nodes.values()
            if can_hold_part(span.part, node) and _could_hold(span.part, node)
        ]
        if len(nodes) >= span.hosts:
            yield span, [(span.part, node) for node in nodes]


def _over_several(view: PlanningView, spans: Iterable[tuple[Span, list[_Holder]]], choose: Choose) -> LoadPlan | None:
    """The best way to spread a model for which there is memory, on the places that `choose` finds."""
    for span, holders in spans:
        found = (choose(view, list(_device_sets(view, [holder]))) for holder in holders)
        plan = plan_together(view, span, [part for part in found if part is not None])
        if plan is not None:
            return plan
    return None


def _device_sets(view: PlanningView, holders: Iterable[_Holder]) -> Iterator[_DeviceSet]:
    for profile, node in holders:
        if _is_evicting(view, profile.id, node):
            continue
        indices = [device.index for device in eligible_devices(profile, node)]
        for devices in device_sets(indices, profile.shares, at_most=MAX_EVICTION_SETS):
            yield _DeviceSet(view, profile, node, devices)


def _is_evicting(view: PlanningView, model_id: str, node: NodeSnapshot) -> bool:
    return any(engine.key in view.fleet.evicting for engine in node.engines(model_id))


def _could_hold(profile: ModelProfile, node: NodeSnapshot) -> bool:
    enough = [device for device in eligible_devices(profile, node) if device.vram_total_mb >= profile.device_share_mb]
    return is_feasible(profile, node) and len(enough) >= profile.shares
