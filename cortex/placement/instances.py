"""Which engines of a model a node has, and whether it may have another. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import EngineSnapshot, NodeSnapshot
from cortex.placement.devices import fit_devices
from cortex.placement.inputs import DRAINING, PlanningView
from cortex.routing.replica import ReplicaKey
from shared.protocol import RAM, ModelStatus, ModelView


@dataclass(frozen=True)
class InstancesOnNode:
    """The engines of a model on a node that run, start or end, without those that sleep or have a sick device.
    `devices` are theirs: no two instances of a model share one."""

    count: int = 0
    devices: frozenset[int] = frozenset()


_NONE = InstancesOnNode()


def instances_on(view: PlanningView, model_id: str, node: NodeSnapshot, only: str | None = None) -> InstancesOnNode:
    """Those that the node lists, and those that we are about to load there. `only`: for an engine of this variant and
    no other; it may share the devices of other variants, or take their place."""
    reserved = {
        each.key: (each.variant, each.devices)
        for each in view.fleet.reservations
        if each.node == node.name and each.model_id == model_id
    }
    if not reserved and model_id not in node.models:
        return _NONE
    listed = {
        each.key: (each.view.variant, tuple(each.view.devices))
        for each in node.engines(model_id)
        if _is_active(view, each)
    }
    apart = (held for variant, held in (*reserved.values(), *listed.values()) if only in (None, variant))
    return InstancesOnNode(len(reserved.keys() | listed.keys()), frozenset(chain.from_iterable(apart)) - {RAM})


def _is_active(view: PlanningView, engine: EngineSnapshot) -> bool:
    entry = engine.view
    if engine.sick_because is not None:
        return False
    return entry.loaded or entry.coming or entry.state == DRAINING or engine.key in view.fleet.evicting


def has_room(profile: ModelProfile, node: NodeSnapshot, here: InstancesOnNode) -> bool:
    """Whether the node may hold another instance of the model beside those `here`, whatever memory is free. A neuron
    without `Discovery.instances` holds one, and so does every one of a model on the CPU, unless `per_node` says more: a
    second would get no other cores."""
    if not here.count:
        return True
    on_devices = bool(node.devices) and any(not choice.on_cpu for choice in profile.choices)
    limit = profile.replicas.per_node or (None if on_devices else 1)
    if not node.has_instances or (limit is not None and here.count >= limit):
        return False
    return any(_has_devices(choice, node, here) for choice in profile.choices)


def _has_devices(choice: ModelProfile, node: NodeSnapshot, here: InstancesOnNode) -> bool:
    if choice.on_cpu:
        return node.ram is not None
    free = sum(device.index not in here.devices for device in fit_devices(choice, node))
    return free >= choice.device_count


def coming(view: PlanningView, model_id: str) -> set[ReplicaKey]:
    """The instances that are being loaded, or that a neuron that is not drained is restarting. One whose device is lost
    or sick does not come back there."""
    starting = {each.key for each in view.fleet.reservations if each.model_id == model_id and each.serves}
    for engine in view.fleet.engines(model_id):
        node = engine.node
        if engine.view.group is not None and not engine.view.group.serves:
            continue
        if engine.view.coming and node.healthy and not engine.leaving and engine.key not in view.fleet.evicting:
            usable = {device.index for device in node.devices}
            if usable.issuperset(engine.view.devices):
                starting.add(engine.key)
    return starting


def sleeping_instance(
    profile: ModelProfile, node: NodeSnapshot, instance: str, here: InstancesOnNode
) -> ModelView | None:
    """The instance if it sleeps here in this variant, and no other instance is on its devices."""
    entry = node.view(profile.id, instance)
    if entry is None or entry.known_status is not ModelStatus.SLEEPING:
        return None
    if not here.devices.isdisjoint(entry.devices) or not node.sick_devices.keys().isdisjoint(entry.devices):
        return None
    return entry if profile.variant in (None, entry.variant) else None
