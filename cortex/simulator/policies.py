"""The policies of a simulation: cortex's planner, and two common policies to compare it with. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cortex.config.catalogue import ModelProfile
from cortex.control.scheduler import PLANNER, Policy
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.capacity import Resident, residents, rooms
from cortex.placement.devices import MAX_DISPLACED_SETS, device_sets, eligible
from cortex.placement.eviction import Claim, Displacement, Eviction
from cortex.placement.fair_queue import Turn, after, has_a_place
from cortex.placement.feasibility import is_feasible
from cortex.placement.inputs import View
from cortex.placement.planner import Fit, Plan, verdicts
from cortex.placement.refusal import refusal
from cortex.placement.replicas import Upkeep
from shared.errors import ServiceError

Choose = Callable[[View, Sequence["_Site"]], Plan | None]
"""Picks one of a model's possible places; None when it has to wait."""


def _first_come_first_served(choose: Choose) -> Policy:
    """Considers the waiting models in order of arrival; each takes the place that `choose` finds. Evicts idle models
    only, whatever their priority and age, and never a pinned one. Adds and retires no replicas."""

    def next_turn(view: View) -> Turn:
        loads: list[Plan] = []
        refused: dict[str, ServiceError] = {}
        notes: dict[str, str] = {}
        for model_id in sorted(view.waiting, key=lambda model_id: (view.waiting[model_id].since, model_id)):
            profile = view.catalogue.profile(model_id)
            if profile is None or has_a_place(view, model_id):
                continue
            nodes = [node for node in view.fleet.nodes.values() if _could_hold(profile, node)]
            if not nodes:
                refused[model_id] = refusal(view, model_id, verdicts(view, profile))
                continue
            here = [node for node in nodes if (model_id, node.name) not in view.fleet.leaving]
            sites = [site for node in here for site in _sites(view, profile, node)]
            plan = choose(view, sites)
            if plan is None:
                notes[model_id] = "waiting for memory"
            else:
                loads.append(plan)
                view = after(view, plan)
        return Turn(tuple(loads), refused, notes)

    def upkeep(view: View, profiles: Iterable[ModelProfile]) -> Upkeep:
        return Upkeep()

    return Policy(next_turn, upkeep)


def _least_recently_used(view: View, sites: Sequence[_Site]) -> Plan | None:
    """The place with the most free memory; if none has enough, evicts the least recently used models."""
    with_room = [site for site in sites if not site.missing_mb]
    if with_room:
        return max(with_room, key=lambda site: site.spare_mb).plan()
    found: list[tuple[float, _Site, list[Resident]]] = []
    for site in sites:
        leaving = site.make_room(view, lambda each: max(each.last_used, each.loaded_at))
        if leaving is not None:
            found.append((max(max(each.last_used, each.loaded_at) for each in leaving), site, leaving))
    if not found:
        return None
    _, site, leaving = min(found, key=lambda each: each[0])
    return site.plan(leaving, view.now)


def _first_fit(view: View, sites: Sequence[_Site]) -> Plan | None:
    """The first node with enough free memory, by name; if none has, evicts the models loaded first, on the first node
    where that is enough."""
    ordered = sorted(sites, key=lambda site: (site.node.name, site.devices))
    for site in ordered:
        if not site.missing_mb:
            return site.plan()
    for site in ordered:
        leaving = site.make_room(view, lambda each: each.loaded_at)
        if leaving is not None:
            return site.plan(leaving, view.now)
    return None


POLICIES: dict[str, Policy] = {
    "planner": PLANNER,
    "lru": _first_come_first_served(_least_recently_used),
    "first-fit": _first_come_first_served(_first_fit),
}


class _Site:
    """A set of devices of one node, as a possible place for a model."""

    def __init__(self, view: View, profile: ModelProfile, node: NodeSnapshot, devices: tuple[int, ...]) -> None:
        self.node = node
        self.devices = devices
        self._model_id = profile.id
        self._share_mb = view.share_mb(profile)
        room = rooms(view, node)
        free = {index: room[index].free_mb for index in devices}
        self.missing_mb = {index: self._share_mb - mb for index, mb in free.items() if mb < self._share_mb}
        self.spare_mb = sum(free.values()) - self._share_mb * len(devices)

    def make_room(self, view: View, age: Callable[[Resident], float]) -> list[Resident] | None:
        """Idle models to evict, oldest first; None when evicting all of them is not enough."""
        idle = [each for each in residents(view, self.node) if not each.in_flight and each.protected is None]
        chosen: list[Resident] = []
        for each in sorted(idle, key=lambda each: (age(each), each.key)):
            if self._suffice(chosen):
                break
            chosen.append(each)
        if not self._suffice(chosen):
            return None
        for each in reversed(list(chosen)):  # keep those that need not go, youngest first
            rest = [other for other in chosen if other is not each]
            if self._suffice(rest):
                chosen = rest
        return chosen

    def plan(self, leaving: Sequence[Resident] = (), now: float = 0.0) -> Plan:
        return Plan(
            model_id=self._model_id,
            node=self.node.name,
            devices=self.devices,
            share_mb=self._share_mb,
            fit=Fit.AFTER_DISPLACEMENT if leaving else Fit.NOW,
            spare_mb=self.spare_mb,
            takes_mb=self._share_mb,
            displacement=Displacement(tuple(Eviction(each, Claim.IDLE, now) for each in leaving)),
        )

    def _suffice(self, leaving: Sequence[Resident]) -> bool:
        return all(
            mb <= sum(each.frees_mb for each in leaving if index in each.devices)
            for index, mb in self.missing_mb.items()
        )


def _sites(view: View, profile: ModelProfile, node: NodeSnapshot) -> Iterator[_Site]:
    indices = [device.index for device in eligible(profile, node)]
    for devices in device_sets(indices, profile.min_devices, at_most=MAX_DISPLACED_SETS):
        yield _Site(view, profile, node, devices)


def _could_hold(profile: ModelProfile, node: NodeSnapshot) -> bool:
    enough = [device for device in eligible(profile, node) if device.vram_total_mb >= profile.device_share_mb]
    return is_feasible(profile, node) and len(enough) >= profile.min_devices
