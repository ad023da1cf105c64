"""Random fleets, models and usage, generated from a seed."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, Reservation
from cortex.placement.inputs import Backoff, PlanningView
from shared.protocol import LinkKind
from tests.cortex.fleets import On, fleet, host
from tests.cortex.views import NOW, asked, profile, used, view

SIZES = (8000, 12000, 24000, 32000, 80000)


@cache
def random_view(seed: int) -> PlanningView:
    """Up to five nodes with one to four GPUs each, and twelve models, three to six of which have waiting requests."""
    random = Random(seed)
    models = tuple(_model(random, f"m{i:02}") for i in range(12))
    nodes = [_node(random, f"n{i}", models) for i in range(random.randint(1, 5))]
    reserved = tuple(_reservation(random, nodes, models) for _ in range(random.choice((0, 0, 1, 2))))
    there = [tuple(engine.key) for each in nodes for engine in each.every_engine()]
    evicting = tuple(key for key in there if random.random() < 0.1)
    return view(
        fleet(*nodes, reservations=reserved, evicting=evicting),
        *models,
        waiting={each.id: random.choice((0.5, 10, 20, 70)) for each in random.sample(models, random.randint(3, 6))},
        usages={
            key: used(random.choice((0, 0, 1, 5)), idle=random.choice((0, 5, 400)), age=random.choice((2, 20, 1000)))
            for key in there
        },
        backoffs={
            (random.choice(models).id, random.choice((*(n.name for n in nodes), "*"))): Backoff(
                NOW + random.choice((-5, 5)), "no", temporary=random.random() < 0.5
            )
            for _ in range(random.choice((0, 1, 3)))
        },
        arrivals={each.id: asked(*sorted((random.uniform(0, 900) for _ in range(9)), reverse=True)) for each in models},
        load_secs={each.id: {"n0": random.uniform(1, 90)} for each in models if random.random() < 0.5},
        observed_share_mb={each.id: 7000 for each in models if each.vram_mb is None and random.random() < 0.5},
    )


def shuffled(moment: PlanningView, seed: int) -> FleetSnapshot:
    """The same fleet with its nodes in a different order."""
    nodes = list(moment.fleet.nodes.values())
    Random(seed).shuffle(nodes)
    return FleetSnapshot({each.name: each for each in nodes}, moment.fleet.reservations, moment.fleet.evicting)


def _model(random: Random, name: str) -> ModelProfile:
    size = random.choice((1, 1, 1, 2, 4))
    fields: dict[str, Any] = {
        "id": name,
        "min_devices": size,
        "residency_priority": random.choice((50, 100, 100, 200)),
        "replicas": {"min": random.choice((0, 0, 0, 1, 3)), "per_node": random.choice((None, None, 2))},
    }
    if random.random() < 0.85:
        fields["vram_mb"] = random.choice((2000, 7000, 14000, 22000, 60000)) * size
    if random.random() < 0.15:
        fields["pinned_on"] = [f"n{random.randint(0, 4)}"]
    return profile(**fields)


def _node(random: Random, name: str, models: tuple[ModelProfile, ...]) -> NodeSnapshot:
    totals = [random.choice(SIZES)] * random.choice((1, 2, 4))
    if random.random() < 0.3:
        totals[-1] = random.choice(SIZES)
    foreign = [random.choice((0, 0, 0, 3000)) for _ in totals]
    free = [total - other for total, other in zip(totals, foreign, strict=True)]
    there: dict[str, On] = {}
    instances = random.random() < 0.5
    for model in random.sample(models, random.randint(0, 6)) * (2 if instances else 1):
        taken = {i for key, on in there.items() if key.startswith(model.id) for i in on.devices}
        key = f"{model.id}#1" if model.id in there else model.id
        devices = tuple(sorted(random.sample(range(len(totals)), min(model.min_devices, len(totals)))))
        mb = model.device_share_mb or 7000
        status = random.choice(("loaded",) * 5 + ("sleeping", "loading", "unloaded", "failed", "what?"))
        if status in ("unloaded", "failed") or len(devices) < model.min_devices:
            there.setdefault(model.id, On(0, (), "unloaded"))
        elif taken.isdisjoint(devices) and all(free[i] >= mb for i in devices):
            held = 500 if status == "sleeping" else mb
            there[key] = On(held, devices, status, wants_mb=mb - held, working=random.choice((0, 0, 0, 2)))
            for i in devices:
                free[i] -= held
    return host(
        name,
        *totals,
        models={k: v for k, v in there.items() if v.status != "sleeping" or all(free[i] >= 0 for i in v.devices)},
        foreign_mb=tuple(foreign),
        protocol_v1=not instances and random.random() < 0.6,
        instances=instances,
        links={(0, 1): random.choice(list(LinkKind))} if len(totals) > 1 and random.random() < 0.5 else None,
        healthy=random.random() < 0.9,
        draining=random.random() < 0.1,
    )


def _reservation(random: Random, nodes: list[NodeSnapshot], models: tuple[ModelProfile, ...]) -> Reservation:
    where, model = random.choice(nodes), random.choice(models)
    devices = tuple(range(min(model.min_devices, len(where.devices))))
    return Reservation(model.id, where.name, devices, model.device_share_mb or 5000)
