"""Snapshots written out by hand, for tests of pure decisions."""

from __future__ import annotations

from cortex.snapshot import FleetSnapshot, NodeSnapshot, Reservation
from shared.protocol import Device, DeviceHealth, Discovery, Link, LinkKind, ModelView, NeuronHealth


def node(
    name: str,
    *total_mb: int,
    free_mb: tuple[int, ...] | None = None,
    models: dict[str, str] | None = None,
    links: dict[tuple[int, int], LinkKind] | None = None,
    harnesses: tuple[str, ...] = ("vllm",),
    lost: tuple[int, ...] = (),
    mig: tuple[int, ...] = (),
    healthy: bool = True,
    draining: bool = False,
    discovered: bool = True,
) -> NodeSnapshot:
    """A neuron with devices of these totals, by default all free; `models` is id -> status."""
    free = free_mb if free_mb is not None else total_mb
    discovery = Discovery(
        devices=[
            Device(
                index=i,
                name="GPU",
                vram_total_mb=mb,
                lost="gone" if i in lost else None,
                mig_mode=i in mig if mig else None,
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
        models={model_id: ModelView(id=model_id, status=status) for model_id, status in (models or {}).items()},
    )


def fleet(*nodes: NodeSnapshot, reservations: tuple[Reservation, ...] = ()) -> FleetSnapshot:
    return FleetSnapshot({entry.name: entry for entry in nodes}, reservations)


BEAST = node("beast", 32607, 32607)
BENJY = node("benjy", 24564)
QUADBRAT = node("quadbrat", 12288)
SEED_FLEET = fleet(BEAST, BENJY, QUADBRAT)
"""The example fleet, empty."""
