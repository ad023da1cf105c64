"""Where a model goes and which models are evicted for it, or why it cannot be placed. Pure.

Preferences in order: pinned nodes; waking it where it sleeps; free memory; memory freed by evictions, cheapest first
(see `eviction`); a neuron that already knows the model; the tightest fit, so that large cards stay free for large
models; the best connected devices; the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot, Reservation
from cortex.placement.candidates import shortlist
from cortex.placement.capacity import Resident, Room, books, likely_load_secs, pending, residents, rooms
from cortex.placement.devices import MAX_DISPLACED_SETS, connection, device_sets, eligible, tightness
from cortex.placement.eviction import (
    NO_EVICTIONS,
    Claim,
    Displacement,
    Eviction,
    displace,
    displace_each,
    eviction,
    shield,
    suffice,
)
from cortex.placement.feasibility import infeasible_reason
from cortex.placement.inputs import View
from shared.gpus import DEFAULT_ENGINE_SHARE
from shared.protocol import ModelStatus

DRAINING = "draining"
"""`ModelView.state` of an engine that accepts no new requests and exits after its current ones. Its status is
`unloaded`."""


class Fit(IntEnum):
    """How a model fits on a node, best first."""

    AWAKE = 0  # sleeps there and its memory is still available
    NOW = 1  # fits in free memory
    OVER_SLEEPERS = 2  # fits, but uses memory that sleeping models there would need
    AFTER_DISPLACEMENT = 3
    TOO_LARGE = 4  # by the figures; `vram_mb` is an estimate, so the neuron decides


@dataclass(frozen=True)
class Plan:
    """A place for a model. `share_mb` is what each device must give, 0 when unknown. `takes_mb` is what to count as
    taken on each until the neuron reports it. `spare_mb` is what stays free on all devices together (negative: what
    is missing). `ready_at` is when it can start, on the view's clock. `expected_secs` is the expected load time, if
    known. `wakes`: the model sleeps there and is woken."""

    model_id: str
    node: str
    devices: tuple[int, ...]
    share_mb: int
    fit: Fit
    spare_mb: int
    takes_mb: int
    displacement: Displacement = NO_EVICTIONS
    ready_at: float = float("-inf")
    expected_secs: float | None = None
    wakes: bool = False
    rank: tuple[object, ...] = field(default=(), compare=False)

    @property
    def reason(self) -> str:
        return f"{self.node}: {_fit_reason(self)}"

    @property
    def reservation(self) -> Reservation:
        """The memory reserved while the plan is carried out."""
        return Reservation(self.model_id, self.node, self.devices, self.takes_mb)


@dataclass(frozen=True)
class Held:
    """Nothing can be done on the node now. `passes`: that will change without further action."""

    reason: str
    passes: bool = False


@dataclass(frozen=True)
class Verdict:
    """The result for one node: its best plan, or why it has none."""

    node: str
    plan: Plan | None
    reason: str
    passes: bool = False


def likely_verdicts(view: View, profile: ModelProfile) -> list[Verdict]:
    """What the most promising nodes could do for the model; every node when none of those can do anything."""
    found = [verdict_on(view, profile, node) for node in shortlist(view, profile)]
    hopeful = any(each.passes or (each.plan is not None and each.plan.fit is not Fit.TOO_LARGE) for each in found)
    return found if hopeful or len(found) == len(view.fleet.nodes) else verdicts(view, profile)


def verdicts(view: View, profile: ModelProfile) -> list[Verdict]:
    """What each node of the fleet could do for a first or additional replica of the model."""
    return [verdict_on(view, profile, node) for node in view.fleet.nodes.values()]


def best(found: Iterable[Verdict]) -> Plan | None:
    """The best of these plans. None when there is none, or when waiting is better: a load that does not fit by the
    figures is only tried when no node will become available."""
    listed = list(found)
    plan = min((each.plan for each in listed if each.plan is not None), key=lambda plan: plan.rank, default=None)
    hope = any(each.passes for each in listed)
    return None if plan is not None and plan.fit is Fit.TOO_LARGE and hope else plan


def verdict_on(view: View, profile: ModelProfile, node: NodeSnapshot) -> Verdict:
    """What one node could do for the model."""
    obstacle = _obstacle(view, profile, node)
    found = plan_on(view, profile, node) if obstacle is None else obstacle
    if isinstance(found, Held):
        return Verdict(node.name, None, found.reason, found.passes)
    return Verdict(node.name, found, _fit_reason(found))


def _obstacle(view: View, profile: ModelProfile, node: NodeSnapshot) -> Held | None:
    """Why the node is ruled out before memory is considered."""
    reason = infeasible_reason(profile, node)
    if reason is None and node.discovery is None:
        reason = f"not reached yet: {node.last_error or 'no answer so far'}"
    if reason is None and not node.healthy:
        reason = f"down: {node.last_error}"
    if reason is None and node.draining:
        reason = "draining"
    return _passing_obstacle(view, profile, node) if reason is None else Held(reason)


def _passing_obstacle(view: View, profile: ModelProfile, node: NodeSnapshot) -> Held | None:
    entry, bar = node.models.get(profile.id), view.bar(profile.id, node.name)
    if (profile.id, node.name) in view.fleet.leaving:
        return Held("is unloading it", passes=True)
    if entry is not None and entry.state == DRAINING:  # by another cortex; a load would wait until it is gone
        return Held("is still draining it", passes=True)
    if node.status_of(profile.id) is ModelStatus.LOADED:
        return Held("already has it")
    if node.has_coming(profile.id):
        return Held("is already bringing it up", passes=True)
    if bar is not None:
        return Held(f"not tried again for {bar.until - view.now:.1f} s: {bar.reason}", passes=bar.passes)
    return None


@dataclass(frozen=True)
class _Site:
    """A feasible node as a place for one model. `need` is what each device must give. `to_wake` is what each device
    the model sleeps on must give, empty when it does not sleep here. `floor` are the eligible devices. `share` is 0
    for a model of unknown size. All in MiB."""

    view: View
    profile: ModelProfile
    node: NodeSnapshot
    share: int
    room: Mapping[int, Room]
    need: Mapping[int, int]
    to_wake: Mapping[int, int]
    floor: list[int]

    @property
    def asleep_on(self) -> tuple[int, ...]:
        return tuple(sorted(self.to_wake))

    def sets(self, devices: Sequence[int], **limit: int) -> Iterator[tuple[int, ...]]:
        return device_sets(devices, self.profile.min_devices, **limit)

    def may_fit(self, indices: tuple[int, ...]) -> bool:
        """Whether it would fit on these devices if they were empty, on a node that reports bookable memory."""
        return books(self.node) and all(self.need[index] <= self.room[index].total_mb for index in indices)

    def missing_mb(self, indices: tuple[int, ...], *, wakes: bool = False) -> dict[int, int]:
        """Missing memory by device, assuming that sleeping models give up theirs."""
        need = self.to_wake if wakes else self.need
        return {i: need[i] - self.room[i].free_mb for i in indices if self.room[i].free_mb < need[i]}


def plan_on(view: View, profile: ModelProfile, node: NodeSnapshot) -> Plan | Held:
    """The best a feasible node can do for the model, or why it can do nothing now. Ignores health."""
    site = _site(view, profile, node)
    room, need = site.room, site.need
    if site.to_wake and not site.missing_mb(site.asleep_on, wakes=True):
        return _plan(site, site.asleep_on, Fit.AWAKE, wakes=True)
    for fit, kept in ((Fit.NOW, True), (Fit.OVER_SLEEPERS, False)):
        with_room = [i for i in site.floor if room[i].free_mb - (room[i].asleep_mb if kept else 0) >= need[i]]
        chosen = _best_set(site, with_room)
        if chosen is not None:
            return _plan(site, chosen, fit)
    return _after_displacement(site)


def _site(view: View, profile: ModelProfile, node: NodeSnapshot) -> _Site:
    share, room = view.share_mb(profile), rooms(view, node)
    floor = [device.index for device in eligible(profile, node)]
    if share or books(node):
        need = dict.fromkeys(room, share)
    else:  # an engine takes its share of an empty card, and a shortage only shows when it fails
        need = {device.index: int(device.vram_total_mb * DEFAULT_ENGINE_SHARE) for device in node.devices}
    return _Site(view, profile, node, share, room, need, _to_wake(profile, node, share, room, need), floor)


def _to_wake(
    profile: ModelProfile, node: NodeSnapshot, share: int, room: Mapping[int, Room], need: Mapping[int, int]
) -> dict[int, int]:
    """By device, what the sleeping model needs on top of what it holds, capped at what all sleeping models there
    need."""
    entry = node.models.get(profile.id)
    if entry is None or entry.known_status is not ModelStatus.SLEEPING or not room.keys() >= set(entry.devices):
        return {}
    if books(node) and not share:
        return {index: room[index].asleep_mb for index in entry.devices}
    held = (entry.vram_booked_mb or entry.vram_used_mb or 0) // max(1, len(entry.devices))
    wanted = {index: max(0, need[index] - held) for index in entry.devices}
    return {i: min(mb, room[i].asleep_mb) if room[i].asleep_mb else mb for i, mb in wanted.items()}


def _best_set(site: _Site, devices: list[int]) -> tuple[int, ...] | None:
    """The best connected set of these devices; ties by tightest fit, then lowest indices."""
    room, share = site.room, site.share
    devices.sort(key=lambda index: (tightness((index,), room, share), index))
    return min(
        site.sets(devices),
        key=lambda indices: (connection(site.node, indices), tightness(indices, room, share), indices),
        default=None,
    )


def _after_displacement(site: _Site) -> Plan | Held:
    view, own_id = site.view, site.profile.id
    waiting = view.waiting.get(own_id)
    since = view.now if waiting is None else waiting.since
    there = residents(view, site.node)
    others = [each for each in there if each.key[0] != own_id]
    load_secs = likely_load_secs(view, own_id, site.node.name, site.share * site.profile.min_devices)
    evicted = partial(eviction, view, since=since, load_secs=load_secs)
    movable = [evicted(each) for each in others if shield(each, site.profile.residency_priority) is None]
    # A model that sleeps here wakes on its own devices. To load on others, its sleeping engine must go first.
    own = [Eviction(each, Claim.IDLE, view.now) for each in there if each.key[0] == own_id and each.asleep]
    by_lack = sorted(site.floor, key=lambda index: (max(0, site.need[index] - site.room[index].free_mb), index))
    sets = list(site.sets(by_lack, at_most=MAX_DISPLACED_SETS))
    found = displace_each((site.missing_mb(indices) for indices in sets), [*movable, *own])
    ways = [(indices, way, False) for indices, way in zip(sets, found, strict=True)]
    if site.to_wake:
        ways.append((site.asleep_on, displace(site.missing_mb(site.asleep_on, wakes=True), movable), True))
    possible = [(way.order, indices, way, wakes) for indices, way, wakes in ways if way is not None]
    cheapest = min((order for order, *_ in possible), default=None)
    plans = [
        _plan(site, indices, Fit.AFTER_DISPLACEMENT, way, wakes=wakes)
        for order, indices, way, wakes in possible
        if order == cheapest
    ]
    if not plans:
        moving = pending(view, site.node)
        later = [*movable, *own, *(evicted(each) for each in moving)]
        # While models are loading or leaving, the figures will change: wait rather than try a load that might fit then.
        if moving and any(site.may_fit(indices) or suffice(site.missing_mb(indices), later) for indices in sets):
            names = ", ".join(sorted({each.key[0] for each in moving}))
            return Held(f"waiting for {names} to finish loading or unloading", passes=True)
        last = ((indices, _last_resort(site, indices, others, movable)) for indices in sets)
        plans = [_plan(site, indices, Fit.TOO_LARGE, way) for indices, way in last if way is not None]
    return min(plans, key=lambda plan: plan.rank, default=None) or _blocked(site, others)


def _last_resort(
    site: _Site, indices: tuple[int, ...], there: list[Resident], movable: list[Eviction]
) -> Displacement | None:
    """What to evict when even that is not enough by the figures. The rest is held by an unknown process or the
    figures are wrong, so the neuron decides. A neuron that books memory decides before anything starts, so nothing
    is evicted for it. None when a model that may not be evicted is in the way."""
    missing = site.missing_mb(indices)
    concerned = {each.key for each in there if each.devices & missing.keys()}
    leaving = tuple(each for each in movable if each.resident.key in concerned)
    if len(leaving) < len(concerned):
        return None
    return NO_EVICTIONS if books(site.node) else Displacement(leaving)


def _plan(
    site: _Site,
    indices: tuple[int, ...],
    fit: Fit,
    displacement: Displacement = NO_EVICTIONS,
    *,
    wakes: bool = False,
) -> Plan:
    profile, node, room, share = site.profile, site.node, site.room, site.share
    need = site.to_wake if wakes else site.need
    freed = sum(
        each.resident.frees_mb * len(each.resident.devices.intersection(indices)) for each in displacement.evictions
    )
    spare = sum(room[index].free_mb - need[index] for index in indices) + freed
    takes = max(need[index] for index in indices)
    if not takes and not wakes:
        takes = max(0, *(room[index].free_mb for index in indices))
    known = node.status_of(profile.id) in (ModelStatus.UNLOADED, ModelStatus.SLEEPING)
    connected = connection(node, indices)
    return Plan(
        model_id=profile.id,
        node=node.name,
        devices=indices,
        share_mb=share,
        fit=fit,
        spare_mb=spare,
        takes_mb=takes,
        displacement=displacement,
        ready_at=displacement.ready_at,
        expected_secs=site.view.expected_load_secs(profile.id, node.name),
        wakes=wakes,
        rank=(
            fit,
            displacement.order,
            not wakes,
            not known,
            spare if share else -spare,
            *connected,
            node.name,
            indices,
            displacement.names,
        ),
    )


def _fit_reason(plan: Plan) -> str:
    if plan.fit is Fit.AWAKE:
        return "asleep there, can be woken"
    if plan.fit is Fit.NOW:
        return f"fits now with {plan.spare_mb} MiB to spare"
    if plan.fit is Fit.OVER_SLEEPERS:
        return f"fits now with {plan.spare_mb} MiB to spare, in memory that sleeping models need to wake"
    names = ", ".join(each.resident.key[0] for each in plan.displacement.evictions)
    if plan.fit is Fit.AFTER_DISPLACEMENT:
        return f"fits after displacement of {names}"
    after = f" even after evicting {names}" if names else ""
    return f"needs {plan.share_mb} MiB on each device, {-plan.spare_mb} MiB more than available{after}; trying anyway"


def _blocked(site: _Site, there: list[Resident]) -> Held:
    free = ", ".join(f"{each.free_mb} MiB free on device {index}" for index, each in site.room.items())
    size = site.profile.min_devices
    what = f"needs {site.share} MiB" + (f" on each of {size} devices" if size > 1 else "")
    reasons = ((each.key[0], shield(each, site.profile.residency_priority)) for each in there)
    stays = "; ".join(f"{name} stays ({why})" for name, why in reasons if why is not None)
    return Held(f"{what}, {free}" + (f"; {stays}" if stays else ""))
