"""What one node can do for a model: on which devices it fits, what to evict for it, or why it does not fit. Pure.

Preferences in order: waking it where it sleeps; free memory; memory freed by evictions, cheapest first (see
`eviction`); devices where no other engine is starting, else the shortest wait (see `starts`); the better variant; a
neuron that already knows the model; the tightest fit, so that large cards stay free for large models; the best
connected devices; the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import (
    DeviceCapacity,
    ResidentModel,
    device_memory,
    engines_by_device,
    estimated_load_secs,
    models_in_transition,
    reports_bookable_memory,
    resident_models,
    wake_mb,
)
from cortex.placement.devices import (
    MAX_EVICTION_SETS,
    DeviceLayout,
    best_fit_rank,
    comparable_devices,
    device_layout,
    device_sets,
    disjoint_groups,
    fit_devices,
    tensor_groups,
)
from cortex.placement.eviction import (
    NO_EVICTIONS,
    Eviction,
    EvictionClass,
    EvictionPlan,
    assess_eviction,
    evictable_residents,
    free_enough,
    plan_evictions,
    plan_evictions_each,
    protection_reason,
)
from cortex.placement.inputs import PlanningView, WaitingRequests
from cortex.placement.instances import instances_on, sleeping_instance
from cortex.placement.load_plan import Fit, LoadPlan
from cortex.placement.starts import Starts, longest, starts_by_device
from shared.gpus import DEFAULT_ENGINE_SHARE, MEMORY_STEP_MB
from shared.protocol import RAM, ModelStatus


@dataclass(frozen=True)
class Rejection:
    """Why the node cannot take the model now. `temporary`: that changes without further action."""

    reason: str
    temporary: bool = False


@dataclass(frozen=True)
class _Candidate:
    """A feasible node, evaluated for one model.

    `instance` names the engine. `needed_mb` is what each device must give. `wake_mb` is what each device the model
    sleeps on must give, empty when it does not sleep here. `eligible` are the indices of the usable devices that are
    large enough, `held` those of other instances of the model. `share` is 0 for a model of unknown size. All in MiB.
    `starts` are those of other engines, by device.
    """

    view: PlanningView
    profile: ModelProfile
    node: NodeSnapshot
    only_variant: bool
    instance: str
    others: int
    share: int
    memory: Mapping[int, DeviceCapacity]
    needed_mb: Mapping[int, int]
    wake_mb: Mapping[int, int]
    eligible: list[int]
    held: frozenset[int]
    starts: Mapping[int, Starts]
    layout: DeviceLayout

    @property
    def asleep_on(self) -> tuple[int, ...]:
        return tuple(sorted(self.wake_mb))

    @property
    def by_shortage(self) -> list[int]:
        """The eligible devices, those that lack the least memory first."""
        return sorted(self.eligible, key=lambda i: (max(0, self.needed_mb[i] - self.memory[i].free_mb), i))

    def sets(self, devices: Sequence[int], **limit: int) -> Iterator[tuple[int, ...]]:
        return device_sets(devices, self.profile.shares, **limit)

    def may_replace(self, resident: ResidentModel) -> bool:
        """Whether an engine of the same model may be evicted: it is of another variant, which will not do."""
        return self.only_variant and not resident.asleep and resident.variant != self.profile.variant

    def fits_when_empty(self, indices: tuple[int, ...]) -> bool:
        """Whether it would fit on these devices if they were empty, on a node that reports bookable memory."""
        return reports_bookable_memory(self.node) and all(
            self.needed_mb[index] <= self.memory[index].total_mb for index in indices
        )

    def missing_mb(self, indices: tuple[int, ...], *, wakes: bool = False) -> dict[int, int]:
        """Missing memory by device, assuming that sleeping models give up theirs."""
        needed_mb = self.wake_mb if wakes else self.needed_mb
        return {i: needed_mb[i] - self.memory[i].free_mb for i in indices if self.memory[i].free_mb < needed_mb[i]}


def plan_on_node(
    view: PlanningView, profile: ModelProfile, node: NodeSnapshot, *, only_variant: bool = False
) -> LoadPlan | Rejection:
    """The best a feasible node can do for the model in one of its `choices`, or why it can do nothing now. Ignores
    health. `only_variant`: no other one will do, so engines of other variants are as those of other models."""
    candidate = _candidate(view, profile, node, only_variant=only_variant)
    memory, needed_mb = candidate.memory, candidate.needed_mb
    if candidate.wake_mb and not candidate.missing_mb(candidate.asleep_on, wakes=True):
        return _plan(candidate, candidate.asleep_on, Fit.AWAKE, wakes=True)
    for fit, spare_sleepers in ((Fit.NOW, True), (Fit.OVER_SLEEPERS, False)):
        with_memory = [
            i
            for i in candidate.eligible
            if memory[i].free_mb - (memory[i].sleeping_mb if spare_sleepers else 0) >= needed_mb[i]
        ]
        chosen = _best_set(candidate, with_memory)
        if chosen is not None:
            return _plan(candidate, chosen, fit)
    return _after_eviction(candidate)


def _candidate(view: PlanningView, profile: ModelProfile, node: NodeSnapshot, *, only_variant: bool) -> _Candidate:
    share, memory = view.device_share_mb(profile), device_memory(view, node)
    here = instances_on(view, profile.id, node, profile.variant if only_variant else None)
    eligible = [device.index for device in fit_devices(profile, node) if device.index not in here.devices]
    if share or reports_bookable_memory(node):
        needed_mb = dict.fromkeys(memory, share)
    else:  # an engine takes its share of an empty card, and a shortage only shows when it fails
        needed_mb = {device.index: int(device.vram_total_mb * DEFAULT_ENGINE_SHARE) for device in node.devices}
        needed_mb |= dict.fromkeys(memory.keys() - needed_mb.keys(), 0)
    instance = view.instance_to_load(profile.id, node, profile.variant)
    waking = wake_mb(node, sleeping_instance(profile, node, instance, here), share, memory, needed_mb)
    starts = starts_by_device(view, node, profile.id)
    layout = device_layout(node, memory, engines_by_device(view, node))
    candidate = partial(_Candidate, view, profile, node, only_variant, instance, here.count, share, memory)
    return candidate(needed_mb, waking, eligible, here.devices, starts, layout)


def _best_set(candidate: _Candidate, devices: Sequence[int]) -> tuple[int, ...] | None:
    """The set of these devices with the shortest wait for other starts; ties by connection, tightest fit, how well it
    fills up the node, then lowest indices. Chosen one tensor group after another, in the order of the ranks: only a
    tensor group needs fast paths."""
    memory, share, starts, layout = candidate.memory, candidate.share, candidate.starts, candidate.layout
    parallel = candidate.profile.parallelism
    if parallel.devices == 1:
        return layout.best_single(devices, {index: each.rank for index, each in starts.items()}, share)

    def rank(before: tuple[int, ...], group: tuple[int, ...]) -> tuple[object, ...]:
        return (
            longest(starts, group).rank,
            layout.connection((group,), before),
            best_fit_rank(group, memory, share),
            layout.packing(group),
            group,
        )

    if comparable_devices(len(devices), parallel.tensor) < len(devices):
        devices = sorted(devices, key=lambda i: (longest(starts, (i,)).rank, best_fit_rank((i,), memory, share), i))
    return disjoint_groups(devices, parallel.tensor, parallel.tensor_groups, rank)


def _after_eviction(candidate: _Candidate) -> LoadPlan | Rejection:
    view, model_id = candidate.view, candidate.profile.id
    waiting = view.waiting_for(candidate.profile.requested) or WaitingRequests(1, view.now)
    residents = resident_models(view, candidate.node)
    others = [each for each in residents if each.key.model_id != model_id or candidate.may_replace(each)]
    load_secs = estimated_load_secs(
        view, candidate.profile.requested.name, candidate.node.name, candidate.share * candidate.profile.shares
    )
    priority = candidate.profile.residency_priority
    displacer = view.displacer_of(model_id)
    assess = partial(
        assess_eviction, view, waiting=waiting, priority=priority, load_secs=load_secs, displacer=displacer
    )
    evictable = [assess(each) for each in evictable_residents(others, priority)]
    # A model that sleeps here wakes on its own devices. To load on others, its sleeping engine must go first.
    own = [Eviction(each, EvictionClass.IDLE, view.now) for each in residents if each.asleep and each not in others]
    sets = candidate.sets(candidate.by_shortage, at_most=MAX_EVICTION_SETS)
    shortages = [(indices, candidate.missing_mb(indices)) for indices in sets]
    plans = _cheapest_plans(candidate, shortages, evictable, own)
    if not plans:
        in_transition = models_in_transition(view, candidate.node)
        later = [*evictable, *own, *(assess(each) for each in in_transition)]
        # While models are being loaded or evicted, the figures will change: wait for a load that might fit then.
        if in_transition and any(
            candidate.fits_when_empty(indices) or free_enough(missing, later) for indices, missing in shortages
        ):
            names = ", ".join(sorted({each.key.model_id for each in in_transition}))
            return Rejection(f"waiting for {names} to finish loading or unloading", temporary=True)
        last_resorts = ((indices, _last_resort(candidate, indices, others, evictable)) for indices, _ in shortages)
        plans = [
            _plan(candidate, indices, Fit.TOO_LARGE, eviction_plan)
            for indices, eviction_plan in last_resorts
            if eviction_plan is not None
        ]
    return min(plans, key=lambda plan: plan.rank, default=None) or _no_memory(candidate, others)


def _cheapest_plans(
    candidate: _Candidate,
    shortages: list[tuple[tuple[int, ...], dict[int, int]]],
    evictable: list[Eviction],
    own: list[Eviction],
) -> list[LoadPlan]:
    """The plans whose evictions cost least, over these sets of devices with the memory that each lacks."""
    found = plan_evictions_each((missing for _, missing in shortages), [*evictable, *own])
    options = [(indices, eviction_plan, False) for (indices, _), eviction_plan in zip(shortages, found, strict=True)]
    if candidate.wake_mb:
        asleep_on = candidate.asleep_on
        options.append((asleep_on, plan_evictions(candidate.missing_mb(asleep_on, wakes=True), evictable), True))
    possible = [
        (eviction_plan.order, indices, eviction_plan, wakes)
        for indices, eviction_plan, wakes in options
        if eviction_plan is not None
    ]
    cheapest = min((order for order, *_ in possible), default=None)
    return [
        _plan(candidate, indices, Fit.AFTER_EVICTION, eviction_plan, wakes=wakes)
        for order, indices, eviction_plan, wakes in possible
        if order == cheapest
    ]


def _last_resort(
    candidate: _Candidate, indices: tuple[int, ...], residents: list[ResidentModel], evictable: list[Eviction]
) -> EvictionPlan | None:
    """What to evict when even that is not enough by the figures. The rest is held by an unknown process or the
    figures are wrong, so the neuron decides. A neuron that books memory decides before anything starts, so nothing
    is evicted for it. None when a model that may not be evicted is in the way."""
    missing = candidate.missing_mb(indices)
    concerned = {each.key for each in residents if each.devices & missing.keys() or any(map(each.frees_on, missing))}
    evicting = tuple(each for each in evictable if each.resident.key in concerned)
    if len(evicting) < len(concerned):
        return None
    return NO_EVICTIONS if reports_bookable_memory(candidate.node) else EvictionPlan(evicting)


def _plan(
    candidate: _Candidate,
    indices: tuple[int, ...],
    fit: Fit,
    eviction_plan: EvictionPlan = NO_EVICTIONS,
    *,
    wakes: bool = False,
) -> LoadPlan:
    profile, node, memory, share = candidate.profile, candidate.node, candidate.memory, candidate.share
    if not wakes and profile.parallelism.tensor_groups > 1:
        indices = _best_set(candidate, indices) or indices
    needed_mb = candidate.wake_mb if wakes else candidate.needed_mb
    freed = sum(each.resident.frees_on(index) for each in eviction_plan.evictions for index in indices)
    counted = all(memory[index].counted for index in indices)
    spare = sum(memory[index].free_mb - needed_mb[index] for index in indices) + freed if counted else 0
    reserve = max(needed_mb[index] for index in indices)
    if not reserve and not wakes and counted:
        reserve = max(0, *(memory[index].free_mb for index in indices))
    known = node.has_status(profile.id, ModelStatus.UNLOADED, ModelStatus.SLEEPING)
    layout, spare_steps = candidate.layout, spare // MEMORY_STEP_MB
    starts = longest(candidate.starts, indices)
    return LoadPlan(
        model_id=profile.id,
        node=node.name,
        devices=indices,
        device_share_mb=share,
        fit=fit,
        spare_mb=spare,
        reserve_mb=reserve,
        variant=profile.variant,
        eviction_plan=eviction_plan,
        ready_at=eviction_plan.ready_at,
        expected_secs=candidate.view.expected_load_secs(profile.requested.name, node.name),
        wakes=wakes,
        instance=candidate.instance,
        starts=starts,
        memory_known=counted,
        rank=(
            fit,
            eviction_plan.order,
            starts.rank,
            candidate.others,
            not wakes,
            profile.place,
            not known,
            spare_steps if share else -spare_steps,
            layout.connection(tensor_groups(indices, profile.parallelism.tensor)),
            layout.packing(indices),
            node.name,
            indices,
            eviction_plan.names,
        ),
    )


def _free_text(index: int, memory: DeviceCapacity, fault: str | None) -> str:
    if index == RAM:
        return f"{memory.free_text} of RAM free"
    return f"device {index} cannot be used ({fault})" if fault else f"{memory.free_text} free on device {index}"


def _no_memory(candidate: _Candidate, residents: list[ResidentModel]) -> Rejection:
    held, sick = sorted(candidate.held & candidate.memory.keys()), candidate.node.sick_devices
    on_cpu = candidate.profile.on_cpu
    free = ", ".join(
        _free_text(index, each, sick.get(index))
        for index, each in candidate.memory.items()
        if index not in held and (index == RAM) is on_cpu
    )
    devices = "devices" if len(held) > 1 else "device"
    taken = f"; another instance is on {devices} {', '.join(map(str, held))}" if held else ""
    size = candidate.profile.shares
    what = f"needs {candidate.share} MiB" + (f" on each of {size} devices" if size > 1 else "")
    reasons = ((each.key.model_id, protection_reason(each, candidate.profile.residency_priority)) for each in residents)
    stays = "; ".join(f"{name} stays ({why})" for name, why in reasons if why is not None)
    free = f", {free}" if free else ""  # empty where the model's instances are on all devices
    return Rejection(f"{what}{free}{taken}" + (f"; {stays}" if stays else ""))
