"""What the devices of a node have to give, and what goes when a model goes. Pure; MiB everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from cortex.planning.view import Key, View
from cortex.snapshot import NodeSnapshot
from shared.protocol import Device, ModelStatus, ModelView

SHARED_MEMORY_MB = 1 << 30
"""Stands for the memory of a device that has none of its own to count: it never refuses."""

LOAD_SECS_BASE = 5.0
LOAD_SECS_PER_MB = 0.002
"""What a load is taken to cost where none was ever measured: about the reading of the weights from a disk."""

_HOLDING = (ModelStatus.LOADED, ModelStatus.SLEEPING)


@dataclass(frozen=True)
class Room:
    """One device. `free_mb` can be had now; of that, `asleep_mb` is what models that sleep there want back."""

    total_mb: int
    free_mb: int
    asleep_mb: int = 0


@dataclass(frozen=True)
class Resident:
    """A model on a node that could make way: `frees_mb` on each of its `devices`.

    `protected` says why it may not be displaced by anybody, None when it may by some. `cost` is what displacing it is
    expected to cost: seconds of a reload times requests a minute.
    """

    key: Key
    devices: frozenset[int]
    frees_mb: int
    priority: int
    in_flight: int
    last_used: float
    loaded_at: float
    cost: float
    asleep: bool = False
    kept: bool = False
    """By `replicas.min`: it makes way only for a higher priority."""
    protected: str | None = None


def rooms(view: View, node: NodeSnapshot) -> dict[int, Room]:
    """By device index. Free is what the node would promise to another engine, or what it measures where it does not
    say; less what loads of ours will take that it has not booked yet."""
    return {device.index: _room(view, node, device) for device in node.devices}


def _room(view: View, node: NodeSnapshot, device: Device) -> Room:
    if not device.vram_total_mb:
        return Room(SHARED_MEMORY_MB, SHARED_MEMORY_MB)
    live = node.device_health.get(device.index)
    reserved = view.fleet.reserved_mb(node.name, device.index) - _booked_of_reserved_mb(view, node, device.index)
    if live is None:
        return Room(device.vram_total_mb, device.vram_total_mb - reserved)
    if live.vram_bookable_mb is not None:
        return Room(device.vram_total_mb, live.vram_bookable_mb - reserved, live.vram_asleep_mb or 0)
    measured = live.vram_used_mb or live.vram_free_mb  # both 0: the driver does not say
    return Room(device.vram_total_mb, (live.vram_free_mb if measured else device.vram_total_mb) - reserved)


def _booked_of_reserved_mb(view: View, node: NodeSnapshot, index: int) -> int:
    """What the node has booked already for loads of ours that are under way: it counts once."""
    live, reserved = node.device_health.get(index), view.fleet.reserved_mb(node.name, index)
    if not reserved or live is None or live.vram_booked_mb is None:
        return 0
    under_way = {each.model_id for each in view.fleet.reservations if each.node == node.name}
    settled = sum(
        (entry.vram_booked_mb or 0) // len(entry.devices)
        for entry in node.models.values()
        if index in entry.devices and entry.id not in under_way
    )
    return min(reserved, max(0, live.vram_booked_mb - settled))


def residents(view: View, node: NodeSnapshot) -> list[Resident]:
    """Everything on the node that holds memory and is not on its way up or out."""
    return [
        _resident(view, node, entry)
        for entry in node.models.values()
        if entry.known_status in _HOLDING and (entry.id, node.name) not in view.fleet.leaving
    ]


def pending(view: View, node: NodeSnapshot) -> list[Resident]:
    """What is on its way up or out on the node: its memory cannot be had now, and may be later."""
    moving = [
        _resident(view, node, entry)
        for entry in node.models.values()
        if (entry.known_status is not None and entry.known_status.coming) or (entry.id, node.name) in view.fleet.leaving
    ]
    listed = {each.key[0] for each in moving}
    asked_for = [
        Resident((each.model_id, node.name), frozenset(each.devices), each.share_mb, 0, 0, 0.0, 0.0, 0.0)
        for each in view.fleet.reservations
        if each.node == node.name and each.model_id not in listed
    ]
    return [*moving, *asked_for]


def _resident(view: View, node: NodeSnapshot, entry: ModelView) -> Resident:
    profile = view.catalogue.profile(entry.id)
    use = view.use(entry.id, node.name)
    activity = node.activity.get(entry.id)
    reported = 0 if activity is None else activity.in_flight + activity.queue_depth
    every_device = frozenset(device.index for device in node.devices)
    devices = frozenset(entry.devices) or every_device
    declared = 0 if profile is None else profile.vram_mb or 0
    holds = entry.vram_booked_mb or entry.vram_used_mb or declared or sum(d.vram_total_mb for d in node.devices)
    secs = view.expected_load_secs(entry.id, node.name) or LOAD_SECS_BASE + LOAD_SECS_PER_MB * holds
    serving = sum(other.status_of(entry.id) is ModelStatus.LOADED for other in view.fleet.holders(entry.id))
    return Resident(
        key=(entry.id, node.name),
        devices=devices,
        frees_mb=holds // max(1, len(devices)),
        priority=view.priority(entry.id),
        in_flight=max(use.in_flight, reported),
        last_used=use.last_used,
        loaded_at=use.loaded_at,
        cost=secs * view.demand.get(entry.id, 0.0),
        asleep=entry.known_status is ModelStatus.SLEEPING,
        kept=profile is not None and serving <= profile.replicas.min,
        protected=f"pinned on {node.name}" if profile is not None and node.name in profile.pinned_on else None,
    )
