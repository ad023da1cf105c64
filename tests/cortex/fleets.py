"""Snapshots written out by hand, for tests of pure decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, Reservation, by_instance
from cortex.routing.replica import Replica, ReplicaKey
from shared.protocol import (
    FIRST_INSTANCE,
    Device,
    DeviceHealth,
    Discovery,
    Link,
    LinkKind,
    ModelActivity,
    ModelView,
    NeuronHealth,
)


def node(
    name: str,
    *total_mb: int,
    free_mb: tuple[int, ...] | None = None,
    models: dict[str, str] | None = None,
    links: dict[tuple[int, int], LinkKind] | None = None,
    harnesses: tuple[str, ...] = ("vllm",),
    lost: tuple[int, ...] = (),
    mig: tuple[int, ...] = (),
    slices: tuple[int, ...] = (),
    healthy: bool = True,
    draining: bool = False,
    discovered: bool = True,
    capability: str | None = None,
) -> NodeSnapshot:
    """A neuron with devices of these totals, by default all free; `models` is id -> status. The devices `slices` are
    MIG instances of the first of `mig`."""
    free = free_mb if free_mb is not None else total_mb
    discovery = Discovery(
        devices=[
            Device(
                index=i,
                name="GPU",
                vram_total_mb=mb,
                compute_capability=capability,
                lost="gone" if i in lost else None,
                mig_mode=i in mig if mig else None,
                kind="mig" if i in slices else "gpu",
                parent=mig[0] if i in slices else None,
            )
            for i, mb in enumerate(total_mb)
        ],
        links=[Link(a=a, b=b, kind=kind) for (a, b), kind in (links or {}).items()],
        harnesses=list(harnesses),
    )
    health = NeuronHealth(
        devices=[
            DeviceHealth(index=i, vram_used_mb=total - mb, vram_free_mb=mb)
            for i, (total, mb) in enumerate(zip(total_mb, free, strict=True))
        ]
    )
    return NodeSnapshot(
        name,
        f"http://{name}",
        healthy=healthy,
        draining=draining,
        discovery=discovery if discovered else None,
        health=health if discovered else None,
        models=by_instance(ModelView(id=model_id, status=status) for model_id, status in (models or {}).items()),
    )


@dataclass(frozen=True)
class On:
    """A model on a node: what it holds on each of its devices, and how much more a sleeping one needs to wake."""

    mb: int = 0
    devices: tuple[int, ...] = (0,)
    status: str = "loaded"
    wants_mb: int = 0
    working: int = 0
    known: bool = True
    """Whether the neuron says what it holds."""


def host(
    name: str,
    *total_mb: int,
    models: Mapping[str, On] | None = None,
    foreign_mb: tuple[int, ...] = (),
    protocol_v1: bool = False,
    links: dict[tuple[int, int], LinkKind] | None = None,
    lost: tuple[int, ...] = (),
    healthy: bool = True,
    draining: bool = False,
    instances: bool = False,
) -> NodeSnapshot:
    """A neuron whose figures follow from what is on it. `foreign_mb` is held by unknown processes; a `protocol_v1`
    neuron tells what its devices measure and what its models use, and nothing of bookings. With `instances` it may run
    several engines of one model: "m" is instance "0" of m, "m#1" its instance "1"."""
    there = dict(models or {})
    held = [sum(each.mb for each in there.values() if i in each.devices) for i in range(len(total_mb))]
    asleep = [sum(each.wants_mb for each in there.values() if i in each.devices) for i in range(len(total_mb))]
    foreign = foreign_mb or (0,) * len(total_mb)
    free = tuple(total - mb - other for total, mb, other in zip(total_mb, held, foreign, strict=True))
    bare = node(name, *total_mb, free_mb=free, links=links, lost=lost, healthy=healthy, draining=draining)
    assert bare.health is not None
    assert bare.discovery is not None
    devices = [
        live if protocol_v1 else live.model_copy(update={"vram_bookable_mb": free[i], "vram_asleep_mb": asleep[i]})
        for i, live in enumerate(bare.health.devices)
    ]
    activity = [
        ModelActivity(**_names(key, instances), in_flight=each.working) for key, each in there.items() if each.working
    ]
    return replace(
        bare,
        discovery=bare.discovery.model_copy(
            update={
                "instance_id": None if protocol_v1 else f"{name}-1",
                "leases": not protocol_v1,
                "instances": instances,
            }
        ),
        health=bare.health.model_copy(update={"devices": devices, "models": activity}),
        models=by_instance(
            _entry(_names(key, instances), each, protocol_v1=protocol_v1) for key, each in there.items()
        ),
    )


def _names(key: str, instances: bool) -> dict[str, Any]:
    """`id` and `instance` for a key of `host`'s models."""
    model_id, _, instance = key.partition("#")
    return {"id": model_id, "instance": (instance or FIRST_INSTANCE) if instances else None}


def _entry(names: Mapping[str, Any], on: On, *, protocol_v1: bool) -> ModelView:
    held = on.mb * len(on.devices) if on.known else None
    return ModelView(
        **names,
        status=on.status,
        devices=list(on.devices),
        vram_used_mb=held,
        vram_booked_mb=None if protocol_v1 else held,
    )


def replica_key(model_id: str, node: str, instance: str = "") -> ReplicaKey:
    """Of the only engine of the model on the node, unless an instance is given."""
    return ReplicaKey(model_id, node, instance)


def replica(model_id: str, node: str, url: str, instance: str = "", **fields: Any) -> Replica:
    """A replica with this key."""
    key = replica_key(model_id, node, instance)
    return Replica(key=key, name=key.name, url=url, **fields)


def with_entry(node: NodeSnapshot, entry: ModelView) -> NodeSnapshot:
    """The node with this entry instead of the one that it has, or in addition."""
    rest = [view for view in node.views if (view.id, view.instance) != (entry.id, entry.instance)]
    return replace(node, models=by_instance([*rest, entry]))


def fleet(
    *nodes: NodeSnapshot, reservations: tuple[Reservation, ...] = (), evicting: tuple[tuple[str, ...], ...] = ()
) -> FleetSnapshot:
    """`evicting` are model ids and node names, with an instance where there are several."""
    leaving = frozenset(replica_key(*each) for each in evicting)
    return FleetSnapshot({entry.name: entry for entry in nodes}, reservations, leaving)


BEAST = node("beast", 32607, 32607)
BENJY = node("benjy", 24564)
QUADBRAT = node("quadbrat", 12288)
SEED_FLEET = fleet(BEAST, BENJY, QUADBRAT)
"""The example fleet, empty."""
